"""Encrypted files: nothing to read without the key, nothing to change unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from stillframe.errors import DataError, LockedError, StillframeError
from stillframe.still.frames import LEVEL_NONE, digest_of
from stillframe.still.sealing import (
    KIND_FRAME,
    KIND_INDEX,
    KIND_MANIFEST,
    Seal,
    new_data_key,
    open_object,
    seal_object,
)
from stillframe.still.trailer import (
    TRAILER_FRAME_BYTES,
    Trailer,
    decode_trailer,
    encode_trailer,
)
from stillframe.still.writer import SnapshotWriter
from tests.support_store.memory import MemorySink
from tests.support_store.sealed import KEY, SealedParts, open_sealed, sealed_file
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    ram_frame,
    random_ram,
    small_file,
    tail,
)

ONE = (("pc.ram", 8 * PAGE),)
GOOD = sealed_file()
OTHER = sealed_file()
"""The same content under the same key."""


def test_with_the_key_it_is_the_same_snapshot() -> None:
    snapshot = open_sealed(GOOD)
    assert snapshot.secrets == {KEY.id: KEY.secret}
    report = snapshot.verify()
    assert (report.missing_pages, report.devices) == (0, ("timer",))
    for (block, page), content in random_ram(1).items():
        assert snapshot.read_page(BLOCKS[block][0], page) == (content or bytes(PAGE))
    stream = b"".join(snapshot.iter_stream())
    assert stream.startswith(head())
    assert stream.endswith(tail())


def test_nothing_of_it_is_readable() -> None:
    content = sealed_file(level=LEVEL_NONE)
    assert b"0000:00:01.0/vga.vram" in small_file(level=LEVEL_NONE)  # it would be found
    words = [b"0000:00:01.0/vga.vram", b"state of a device", b"stillframe_version", b"2026-01-02"]
    words += [page[:64] for page in random_ram(1).values() if page]
    for word in words:
        assert word not in content
    assert not [frame for frame in SealedParts(content).frames if b"pc.bios" in frame]


def test_its_id_says_nothing_of_the_content() -> None:
    assert open_sealed(GOOD).id != open_sealed(OTHER).id
    ours, theirs = SealedParts(GOOD), SealedParts(OTHER)
    assert not set(ours.frames) & set(theirs.frames)
    assert ours.index != theirs.index
    assert ours.manifest != theirs.manifest


@pytest.mark.parametrize("given", [None, lambda header: bytes(32)])
def test_no_key_or_another_one(given: Callable[..., bytes] | None) -> None:
    with pytest.raises(LockedError) as caught:
        open_sealed(GOOD, given)
    assert caught.value.exit_code == 12


def test_every_byte_counts() -> None:
    for place in range(0, len(GOOD), 3):
        content = bytearray(GOOD)
        content[place] ^= 1 << place % 8
        with pytest.raises((DataError, LockedError)):
            open_sealed(bytes(content)).verify()


def test_no_end_may_be_missing() -> None:
    for length in range(0, len(GOOD), 7):
        with pytest.raises(DataError):
            open_sealed(GOOD[:length])


def swap_frames(parts: SealedParts) -> None:
    parts.frames[1], parts.frames[2] = parts.frames[2], parts.frames[1]


def repeat_a_frame(parts: SealedParts) -> None:
    parts.frames[2] = parts.frames[1]


def cut_a_frame(parts: SealedParts) -> None:
    del parts.frames[-1]


def frame_of_another_file(parts: SealedParts) -> None:
    parts.frames[1] = SealedParts(OTHER).frames[1]


def index_of_another_file(parts: SealedParts) -> None:
    parts.index = SealedParts(OTHER).index


def manifest_of_another_file(parts: SealedParts) -> None:
    parts.manifest = SealedParts(OTHER).manifest


def seal_of_another_file(parts: SealedParts) -> None:
    parts.seal = SealedParts(OTHER).seal


def all_but_the_frames_of_another_file(parts: SealedParts) -> None:
    other = SealedParts(OTHER)
    parts.seal, parts.index, parts.manifest = other.seal, other.index, other.manifest


def swap_index_and_manifest(parts: SealedParts) -> None:
    parts.index, parts.manifest = parts.manifest, parts.index


def one_more_slot(parts: SealedParts) -> None:
    content = bytearray(parts.seal)
    content[4] += 2  # length of the frame
    content[8 + 60] += 2  # length of the slots
    content[8 + 64 : 8 + 64] = b"[]"
    parts.seal = bytes(content)


def no_seal(parts: SealedParts) -> None:
    parts.seal = b""


@pytest.mark.parametrize(
    "change",
    [
        swap_frames,
        repeat_a_frame,
        cut_a_frame,
        frame_of_another_file,
        index_of_another_file,
        manifest_of_another_file,
        seal_of_another_file,
        all_but_the_frames_of_another_file,
        swap_index_and_manifest,
        one_more_slot,
        no_seal,
    ],
)
def test_what_somebody_does_who_knows_the_format(change: Callable[[SealedParts], None]) -> None:
    parts = SealedParts(GOOD)
    assert parts.join() == GOOD
    change(parts)
    given: list[bytes] = []
    with pytest.raises(StillframeError) as caught:
        given.extend(open_sealed(parts.join()).iter_stream())
    assert isinstance(caught.value, DataError | LockedError)
    assert b"".join(given) in b"".join(open_sealed(GOOD).iter_stream())  # what was given out


def test_frames_that_are_alike_but_for_their_content() -> None:
    """Of one length, so that each fits in the other's place: only digests tell their places."""
    sink = MemorySink()
    with SnapshotWriter(sink, level=LEVEL_NONE, key=KEY) as writer:
        writer.append_stream(head(ONE))
        for first in (0, 4):
            pages = [bytes((n,)) * PAGE for n in range(first + 1, first + 5)]
            raw, runs = ram_frame([(0, first, pages)], ONE)
            writer.append(writer.encode(raw), runs)
        writer.append_stream(tail())
        writer.finish(manifest(ONE))
    parts = SealedParts(sink.content)
    assert len(parts.frames[1]) == len(parts.frames[2])
    swap_frames(parts)
    with pytest.raises(DataError, match="frame 1 of"):
        list(open_sealed(parts.join()).iter_stream())


def test_a_frame_of_another_place_does_not_open_even_with_its_digest() -> None:
    """The digests in the index hold frames in their places; the seal holds each in its number."""
    seal = Seal.new(KEY)
    first, second = seal.seal_frame(b"one"), seal.seal_frame(b"two")
    assert (seal.open_frame(first), seal.open_frame(second)) == (b"one", b"two")
    with pytest.raises(DataError, match="not authentic"):
        seal.open_frame(first[:16] + second[16:])
    part = seal.seal(KIND_INDEX, 0, b"index")
    for kind, number in ((KIND_MANIFEST, 0), (KIND_FRAME, 0), (KIND_INDEX, 1)):
        with pytest.raises(DataError, match="not authentic"):
            seal.open(kind, number, part)
    with pytest.raises(DataError, match="not authentic"):
        Seal.new(KEY).open(KIND_INDEX, 0, part)


def test_no_number_comes_twice() -> None:
    seal = Seal.new(KEY)
    numbers = [bytes(seal.seal_frame(b"")[8:16]) for _ in range(1000)]
    assert len(set(numbers)) == 1000


def test_a_trailer_that_says_that_nothing_is_encrypted() -> None:
    place = GOOD.index(b"STILLTRL") - 8
    trailer = decode_trailer(GOOD[place : place + TRAILER_FRAME_BYTES], place)
    plain = encode_trailer(Trailer(**(trailer._asdict() | {"seal_bytes": 0})))
    content = GOOD[:place] + plain + GOOD[place + TRAILER_FRAME_BYTES :]
    with pytest.raises(DataError):
        open_sealed(content)


def test_small_objects() -> None:
    key = new_data_key()
    sealed = seal_object(key.secret, "catalog/web1", b"name")
    assert b"name" not in sealed
    assert sealed != seal_object(key.secret, "catalog/web1", b"name")
    assert open_object(key.secret, "catalog/web1", sealed) == b"name"
    for secret, name, content in (
        (key.secret, "catalog/web2", sealed),
        (bytes(32), "catalog/web1", sealed),
        (key.secret, "catalog/web1", sealed[:-1]),
        (key.secret, "catalog/web1", b""),
    ):
        with pytest.raises(DataError, match="not authentic"):
            open_object(secret, name, content)


def test_a_verified_file_holds_no_byte_that_nobody_checks() -> None:
    """Also the seek table, of which only zstd's tools make use."""
    content = bytearray(GOOD)
    content[-20] ^= 1
    with pytest.raises(DataError, match="seek table"):
        open_sealed(bytes(content))


def test_the_shallow_verification_reads_every_frame() -> None:
    report = open_sealed(GOOD).verify(deep=False)
    assert msgspec.structs.asdict(report)["frames"] == len(SealedParts(GOOD).frames)
    assert digest_of(GOOD) == digest_of(SealedParts(GOOD).join())
