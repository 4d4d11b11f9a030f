"""Verification finds what a matching digest does not: an index that is not the stream's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest

from stillframe.errors import DataError
from stillframe.model import Manifest
from stillframe.still.container import decode_manifest
from stillframe.still.index import Columns, PageRun
from stillframe.still.index_codec import encode_index
from stillframe.still.writer import SnapshotWriter, encode_manifest
from stillframe.vmstate import writer as stream_writer
from tests.support_store.memory import MemorySink
from tests.support_store.small import (
    PAGE,
    RAM_ID,
    head,
    manifest,
    open_bytes,
    ram_frame,
    small_file,
    tail,
)
from tests.support_store.tamper import Parts

BLOCKS = (("pc.ram", 8 * PAGE), ("pc.bios", 2 * PAGE))
A, B = b"A" * PAGE, b"B" * PAGE
RAM = [(0, 0, [A, B, None, None, A, A, B, None]), (1, 0, [None, B])]


def build(
    pieces: Sequence[bytes | tuple[bytes, list[PageRun]]], *, later_pages_win: bool = False
) -> bytes:
    """A file of these pieces of a stream, between head and tail."""
    sink = MemorySink()
    writer = SnapshotWriter(sink, later_pages_win=later_pages_win)
    for piece in pieces:
        raw, runs = piece if isinstance(piece, tuple) else (piece, [])
        writer.append(writer.encode(raw), runs)
    writer.finish(manifest(BLOCKS, mode="import" if later_pages_win else "background"))
    return sink.content


def whole(*between: bytes | tuple[bytes, list[PageRun]], **options: bool) -> bytes:
    return build([head(BLOCKS), *between, tail()], **options)


def test_a_good_one() -> None:
    seen: list[tuple[int, int]] = []
    report = open_bytes(whole(ram_frame(RAM, BLOCKS))).verify(
        progress=lambda done, total: seen.append((done, total))
    )
    assert (report.data_pages, report.zero_pages, report.missing_pages) == (6, 4, 0)
    assert report.has_description
    assert seen[-1] == (report.stream_bytes, report.stream_bytes)
    shallow = open_bytes(whole(ram_frame(RAM, BLOCKS))).verify(deep=False)
    assert (shallow.deep, shallow.devices, shallow.data_pages) == (False, (), 6)


def test_missing_pages() -> None:
    content = whole(ram_frame([(0, 0, [A, B]), (1, 0, [None, B])], BLOCKS))
    for deep in (False, True):
        with pytest.raises(DataError, match="6 pages are missing"):
            open_bytes(content).verify(deep=deep)


def test_a_stream_without_its_end() -> None:
    with pytest.raises(DataError, match="truncated"):
        open_bytes(build([head(BLOCKS), ram_frame(RAM, BLOCKS)])).verify()


def test_a_stream_without_its_head() -> None:
    with pytest.raises(DataError, match="migration stream"):
        open_bytes(build([ram_frame(RAM, BLOCKS), tail()])).verify()


def test_bytes_after_the_end() -> None:
    with pytest.raises(DataError):
        open_bytes(build([head(BLOCKS), ram_frame(RAM, BLOCKS), tail(), b"more"])).verify()


def test_other_blocks_than_the_stream() -> None:
    other = (("pc.ram", 8 * PAGE), ("pc.rom", 2 * PAGE))
    content = build([head(other), ram_frame(RAM, BLOCKS), tail()])
    with pytest.raises(DataError, match="blocks are not"):
        open_bytes(content).verify()


def _cut_suffix(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw[:-5], runs


def _append_part(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw + ram_frame([(0, 0, [A])], BLOCKS)[0], runs


def _other_section(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    own, other = RAM_ID.to_bytes(4, "big"), (RAM_ID + 1).to_bytes(4, "big")
    return raw[:1] + other + raw[5:-4] + other if raw[1:5] == own else b"", runs


def _other_footer(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw[:-1] + b"\x07", runs


def _swap_pages(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    changed = [
        run._replace(first_page=4) if run.first_page == 0 and not run.block else run
        for run in runs
        if run.first_page != 4
    ]
    return raw, changed


def _swap_single_pages(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw, [run._replace(first_page=1 - run.first_page) if run.block else run for run in runs]


def _other_kind(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw, [run._replace(kind=0) if run.first_page == 4 else run for run in runs]


def _longer_run(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw, [run._replace(pages=3) if run == runs[0] else run for run in runs if run != runs[1]]


def _dirty_zero_page(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    place = runs[1].raw_offset + 8 + 9
    return raw[:place] + b"\xaa" + raw[place + 1 :], runs


def _no_block_name(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    word = stream_writer.ram_page_record(0, A, block=None)
    shift = 1 + len("pc.ram")
    moved = [run._replace(raw_offset=run.raw_offset - shift) for run in runs[1:]]
    return raw[:5] + word + raw[5 + len(word) + shift :], [runs[0], *moved]


def _unlisted_page(raw: bytes, runs: list[PageRun]) -> tuple[bytes, list[PageRun]]:
    return raw, runs[1:]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_cut_suffix, "has no footer"),
        (_append_part, "does not end with its frame"),
        (_other_section, "without its start"),
        (_other_footer, "does not end with its frame"),
        (_swap_pages, "does not agree"),
        (_swap_single_pages, "does not agree"),
        (_other_kind, "does not agree"),
        (_longer_run, "does not agree"),
        (_dirty_zero_page, "does not agree"),
        (_no_block_name, "does not name its block"),
        (_unlisted_page, "not in the index"),
    ],
)
def test_index_and_stream_that_do_not_agree(
    change: Callable[[bytes, list[PageRun]], tuple[bytes, list[PageRun]]], complaint: str
) -> None:
    good = ram_frame(RAM, BLOCKS)
    assert open_bytes(whole(good)).verify().missing_pages == 0
    content = whole(change(*good))
    parts = Parts(content)
    parts.manifest = encode_manifest(
        msgspec.structs.replace(decode_manifest(parts.manifest), mode="import")
    )
    with pytest.raises(DataError, match=complaint):
        open_bytes(parts.join()).verify()


def test_a_run_in_the_wrong_frame() -> None:
    first, second = ram_frame([(0, 0, [A] * 8)], BLOCKS), ram_frame([(1, 0, [B, B])], BLOCKS)
    parts = Parts(whole(first, second))
    index = parts.decoded()
    index.columns.frame[0], index.columns.frame[1] = 2, 1
    parts.index = encode_index(index)
    with pytest.raises(DataError):
        open_bytes(parts.join()).verify()


def test_superseded_pages_are_counted() -> None:
    first = ram_frame([(0, 0, [A] * 8), (1, 0, [None, B])], BLOCKS)
    second = ram_frame([(0, 3, [B, None])], BLOCKS)
    snapshot = open_bytes(whole(first, second, later_pages_win=True))
    report = snapshot.verify()
    assert (report.superseded_pages, report.missing_pages) == (2, 0)
    assert snapshot.read_page("pc.ram", 3) == B
    assert snapshot.read_page("pc.ram", 4) == bytes(PAGE)
    assert [snapshot.read_page("pc.ram", page) for page in (0, 2, 5, 7)] == [A] * 4


def test_a_frame_whose_pages_all_come_again() -> None:
    zeroes = ram_frame([(0, 0, [None] * 4)], BLOCKS)
    final = ram_frame(RAM, BLOCKS)
    snapshot = open_bytes(whole(zeroes, final, later_pages_win=True))
    assert snapshot.verify().superseded_pages == 4
    assert [section.idstr for section in snapshot.skeleton().devices] == ["timer"]


def test_pages_that_only_the_stream_has() -> None:
    hidden = ram_frame(RAM, BLOCKS)[0]
    content = whole(hidden, later_pages_win=True)
    with pytest.raises(DataError, match="outside its frames"):
        open_bytes(content).verify()


@pytest.mark.parametrize("alone", [False, True])
def test_an_index_that_names_an_older_page(alone: bool) -> None:
    """A loader would end with the newer one."""
    first = ram_frame(RAM, BLOCKS)
    again = [(0, 3, [B])] if alone else [(0, 3, [B]), (1, 0, [B])]
    raw, runs = ram_frame(again, BLOCKS)
    content = whole(first, (raw, [run for run in runs if run.block]), later_pages_win=True)
    with pytest.raises(DataError, match="outside its frames" if alone else "not in the index"):
        open_bytes(content).verify()


def _replaced(**fields: object) -> Callable[[Manifest], Manifest]:
    return lambda old: msgspec.structs.replace(old, **fields)


@pytest.mark.parametrize(
    "change",
    [
        _replaced(stream_bytes=1),
        _replaced(blocks=()),
        _replaced(target_page_bytes=8192),
        _replaced(format=2),
        _replaced(created="yesterday"),
    ],
)
def test_a_manifest_of_another_file(change: Callable[[Manifest], Manifest]) -> None:
    parts = Parts(small_file())
    parts.manifest = encode_manifest(change(decode_manifest(parts.manifest)))
    with pytest.raises(DataError):
        open_bytes(parts.join())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": "x"}', b"1e999"],
)
def test_a_malformed_manifest(text: bytes) -> None:
    parts = Parts(small_file())
    parts.manifest = text
    with pytest.raises(DataError, match="manifest"):
        open_bytes(parts.join())


def test_a_seek_table_of_another_file() -> None:
    parts = Parts(small_file())
    sizes = list(parts.decoded().frame_sizes())
    content = parts.join([(sizes[0][0], sizes[0][1] + 1), *sizes[1:]])
    with pytest.raises(DataError, match="seek table"):
        open_bytes(content).verify(deep=False)


def test_damage_names_frame_and_place() -> None:
    content = bytearray(small_file())
    entry = open_bytes(bytes(content)).index.frame(2)
    content[entry.offset_bytes + entry.stored_bytes // 2] ^= 1
    snapshot = open_bytes(bytes(content))
    for deep in (False, True):
        with pytest.raises(DataError, match="frame 2 of memory is damaged") as caught:
            snapshot.verify(deep=deep)
        assert caught.value.offset_bytes == entry.offset_bytes
    with pytest.raises(DataError, match="frame 2"):
        list(snapshot.iter_stream())


def test_a_frame_of_another_size_than_the_index_says() -> None:
    parts = Parts(small_file())
    index = parts.decoded()
    index._raw_bytes[1] -= 1
    index._raw_bytes[2] += 1
    parts.index = encode_index(index)
    with pytest.raises(DataError, match="frame 1 of memory"):
        open_bytes(parts.join()).verify()


def test_rows_are_checked_when_the_index_is_decoded() -> None:
    def swap(columns: Columns) -> None:
        columns.first_page[0], columns.first_page[1] = columns.first_page[1], columns.first_page[0]

    def beyond(columns: Columns) -> None:
        columns.pages[-1] = 1 << 30

    def no_frame(columns: Columns) -> None:
        columns.frame[0] = 1 << 30

    def no_kind(columns: Columns) -> None:
        columns.kind[0] = 2

    def no_place(columns: Columns) -> None:
        columns.raw_offset[0] = 1 << 31

    for change in (swap, beyond, no_frame, no_kind, no_place):
        parts = Parts(small_file())
        index = parts.decoded()
        change(index.columns)
        parts.index = encode_index(index)
        with pytest.raises(DataError, match="index"):
            open_bytes(parts.join())


def test_every_byte_of_a_file_is_covered() -> None:
    good = small_file()
    for place in range(len(good)):
        content = bytearray(good)
        content[place] ^= 1
        try:
            open_bytes(bytes(content)).verify(deep=False)
        except DataError:
            continue
        pytest.fail(f"a change of byte {place} of {len(good)} went unnoticed")
