"""Properties of whole files: round trips, and no change that goes unnoticed or does harm."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.errors import DataError, LockedError, StillframeError
from stillframe.still.export_elf import export_elf
from stillframe.still.export_raw import export_raw
from stillframe.still.frames import LEVEL_NONE, compress_frame, compress_table, decompress_table
from stillframe.still.index_codec import decode_index
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from tests.support_store.memory import MemorySink
from tests.support_store.sealed import open_sealed, sealed_file
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    open_bytes,
    ram_frame,
    small_file,
    tail,
)
from tests.support_store.tamper import Parts, with_frames

contents = st.sampled_from([None, b"a" * PAGE, bytes(range(256)) * 16, b"\0" * (PAGE - 1) + b"\1"])
places = st.tuples(st.integers(0, 2), st.integers(0, 63)).filter(
    lambda place: place[1] < BLOCKS[place[0]][1] // PAGE
)


@cache
def good() -> bytes:
    return small_file(shuffled=True)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(places, contents, max_size=12), min_size=1, max_size=5),
    st.sampled_from([1, 3, LEVEL_NONE]),
)
def test_pages_read_back_and_later_ones_win(
    rounds: list[dict[tuple[int, int], bytes | None]], level: int
) -> None:
    sink = MemorySink()
    truth: dict[tuple[int, int], bytes | None] = {}
    stream = head() + tail()
    with SnapshotWriter(sink, level=level, later_pages_win=True) as writer:
        writer.append_stream(head())
        for ram in rounds:
            runs = []
            raw = bytearray(ram_frame([])[0][:5])
            for (block, page), content in ram.items():  # each page a run that names its block
                piece, (run,) = ram_frame([(block, page, [content])])
                runs.append(run._replace(raw_offset=len(raw)))
                raw += piece[5:-13]
            raw += ram_frame([])[0][-13:]
            writer.append(writer.encode(raw), runs)
            truth |= ram
        writer.append_stream(tail())
        writer.finish(manifest(mode="import"))
    snapshot = open_bytes(sink.content)
    report = snapshot.verify()
    assert report.data_pages == sum(content is not None for content in truth.values())
    assert report.missing_pages == 83 - len(truth)
    assert report.superseded_pages == sum(map(len, rounds)) - len(truth)
    for (block, page), content in truth.items():
        assert snapshot.read_page(BLOCKS[block][0], page) == (content or bytes(PAGE))
    for number, (name, _) in enumerate(BLOCKS):
        pages = dict(snapshot.iter_pages(name))
        assert pages == {page: c for (block, page), c in truth.items() if block == number}
    assert len(b"".join(snapshot.iter_stream())) > len(stream)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(good()) - 1))
    content = bytearray(good())
    content[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        open_bytes(bytes(content)).verify(deep=data.draw(st.booleans()))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_truncation_goes_unnoticed(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(good()) - 1))
    with pytest.raises(DataError):
        open_bytes(good()[:length])


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=100), st.booleans())
def test_bytes_around_the_file_are_noticed(extra: bytes, before: bool) -> None:
    with pytest.raises(DataError):
        open_bytes(extra + good() if before else good() + extra).verify()


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DataError):
        open_bytes(content)


def use(content: bytes) -> None:
    """Everything that can be done with a file; only our own errors may come out."""
    actions: list[Callable[[Snapshot], object]] = [
        lambda s: s.verify(deep=False),
        lambda s: s.verify(),
        lambda s: [s.read_page(b.idstr, n) for b in s.blocks[:3] for n in (0, 1, 17)],
        lambda s: [sum(1 for _ in s.iter_pages(b.idstr)) for b in s.blocks[:3]],
        lambda s: sum(map(len, s.iter_stream())),
        lambda s: s.skeleton(),
        lambda s: export_raw(s, MemorySink(), block=s.blocks[0].idstr),
        lambda s: export_elf(s, MemorySink()),
    ]
    try:
        snapshot = Snapshot(open_bytes(content).container.source)
    except StillframeError:
        return
    for action in actions:
        try:
            action(snapshot)
        except StillframeError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_hostile_index_does_no_harm(seed: int, changes: int) -> None:
    """Any bytes of the tables changed, with digests and checksums that match again."""
    rng = random.Random(seed)
    parts = Parts(good())
    sizes = list(parts.decoded().frame_sizes())
    header = bytearray(parts.index[:40])
    tables_bytes = int.from_bytes(header[32:40], "little")
    tables = bytearray(decompress_table(parts.index[40:], tables_bytes))
    for _ in range(changes):
        tables[rng.randrange(len(tables))] = rng.choice(
            [0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)]
        )
    if rng.random() < 0.3:
        header[rng.randrange(12, 40)] = rng.randrange(256)
    parts.index = bytes(header) + compress_table(bytes(tables), 1)
    use(parts.join(sizes))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_hostile_stream_does_no_harm(seed: int, changes: int) -> None:
    """Any bytes of the decompressed frames changed, with digests that match again."""
    rng = random.Random(seed)
    raws = [bytearray(raw) for raw in open_bytes(good()).iter_stream()]
    for _ in range(changes):
        raw = rng.choice(raws)
        raw[rng.randrange(min(len(raw), 200))] = rng.randrange(256)
    use(with_frames(good(), [compress_frame(raw, 1) for raw in raws]))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_hostile_manifest_does_no_harm(seed: int) -> None:
    rng = random.Random(seed)
    parts = Parts(good())
    text = bytearray(parts.manifest)
    digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
    for _ in range(rng.randrange(1, 5)):
        place = rng.choice(digits)
        text[place : place + 1] = rng.choice([b"-9", b"9" * 30, b"0", b"null", b"1e400", b"\xff"])
        digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
    parts.manifest = bytes(text)
    use(parts.join())


def test_the_good_file_is_good() -> None:
    use(good())
    assert open_bytes(good()).verify().missing_pages == 0
    assert decode_index(Parts(good()).index).run_count > 3


@cache
def sealed() -> tuple[bytes, bytes]:
    """An encrypted file, and its stream."""
    content = sealed_file()
    return content, b"".join(open_sealed(content).iter_stream())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_of_a_changed_encrypted_file_is_given_out(data: st.DataObject) -> None:
    """Whatever is overwritten, moved or left out: what comes out is what was put in, up to where
    it is refused."""
    content, stream = sealed()
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start + 1, min(len(content), start + 600)))
    other = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.sampled_from([b"", content[other : other + end - start]]))
    changed = content[:start] + new + content[end:]
    if changed == content:
        return
    given: list[bytes] = []
    with pytest.raises((DataError, LockedError)):
        given.extend(open_sealed(changed).iter_stream())  # what came before the error stays
    assert stream.startswith(b"".join(given))
