"""Properties of the index: what goes in comes out, the last record counts, damage is an error."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import DataError
from stillframe.model import BlockRecord
from stillframe.still.frames import EncodedFrame
from stillframe.still.index import KIND_DATA, KIND_ZERO, Index, PageRun
from stillframe.still.index_builder import IndexBuilder, pack_runs
from stillframe.still.index_codec import decode_index, encode_index

PAGE = 4096
PAGES = 40
BLOCKS = tuple(
    BlockRecord(idstr=name, used_length_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    for name in ("ram", "a-longer-name")
)

pieces = st.tuples(
    st.integers(0, 1), st.integers(0, PAGES - 1), st.integers(1, 12), st.sampled_from([0, 1])
)
frames = st.lists(st.lists(pieces, max_size=6), max_size=8)

Place = tuple[int, int]
Where = tuple[int, int, int, int]
"""Frame, where in it the page's content starts, kind, where its run starts."""


def build(
    layout: list[list[tuple[int, int, int, int]]], *, later_pages_win: bool
) -> tuple[Index, dict[Place, Where]]:
    """The index of a layout, and where every page's content is by simply writing it out."""
    builder = IndexBuilder()
    truth: dict[Place, Where] = {}
    for number, frame in enumerate(layout):
        runs: list[PageRun] = []
        position = 5
        for block, first, count, kind in frame:
            count = min(count, PAGES - first)
            start = position
            runs.append(PageRun(block, first, count, kind, start))
            for page in range(first, first + count):
                position += 8
                if page == first:
                    position += 1 + len(BLOCKS[block].idstr)
                truth[block, page] = (number, position, kind, start)
                position += PAGE if kind == KIND_DATA else 1
        raw = EncodedFrame(b"x" * (number + 1), position + 13, bytes([number]) * 32)
        builder.add_frame(raw, pack_runs(runs))
    index = builder.build(BLOCKS, target_page_bytes=PAGE, later_pages_win=later_pages_win)
    return index, truth


@given(frames)
def test_the_last_record_of_a_page_counts(layout: list[list[tuple[int, int, int, int]]]) -> None:
    index, truth = build(layout, later_pages_win=True)
    for block, record in enumerate(BLOCKS):
        for page in range(PAGES):
            location = index.lookup(block, page)
            expected = truth.get((block, page))
            if location is None or expected is None:
                assert (location, expected) == (None, None)
                continue
            run = location.run
            stride = 8 + (PAGE if run.kind == KIND_DATA else 1)
            content = run.raw_offset + 8 + location.position * stride
            # A run begins with the record that names its block, or further on in such a run.
            named = run.raw_offset == expected[3]
            assert content + (1 + len(record.idstr) if named else 0) == expected[1]
            assert (location.frame, run.kind) == (expected[0], expected[2])
        data, zero = index.page_counts(block)
        kinds = [kind for (b, _), (_, _, kind, _) in truth.items() if b == block]
        assert (data, zero) == (kinds.count(KIND_DATA), kinds.count(KIND_ZERO))


@given(frames)
def test_encoding_keeps_everything(layout: list[list[tuple[int, int, int, int]]]) -> None:
    index, _ = build(layout, later_pages_win=True)
    again = decode_index(encode_index(index))
    assert again.columns == index.columns
    assert again.blocks == index.blocks
    assert again.target_page_bytes == index.target_page_bytes
    assert [again.frame(n) for n in range(again.frame_count)] == [
        index.frame(n) for n in range(index.frame_count)
    ]
    for number in range(index.frame_count):
        rows = again.runs_of_frame(number)
        assert rows == sorted(rows, key=lambda run: run.raw_offset)
    by_frame = sum(len(again.runs_of_frame(number)) for number in range(again.frame_count))
    assert by_frame == again.run_count
    with_runs = {n for n in range(again.frame_count) if again.runs_of_frame(n)}
    assert set(again.frames_without_runs()) == set(range(again.frame_count)) - with_runs


@given(st.binary(max_size=400))
def test_any_bytes_are_an_index_or_an_error(content: bytes) -> None:
    try:
        decode_index(content)
    except DataError:
        return
    raise AssertionError("random bytes were taken for an index")


GOOD = encode_index(
    build([[], [(0, 0, 9, 1), (0, 20, 3, 0)], [(1, 5, 4, 1)]], later_pages_win=True)[0]
)


@settings(max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_the_same_index_or_an_error(place: int, change: int) -> None:
    """Without the digest: the counts, the checksum and the rows must hold by themselves."""
    content = bytearray(GOOD)
    content[place] ^= change
    try:
        index = decode_index(bytes(content))
    except DataError:
        return
    # A zstd header has bits without a meaning, and the page size only scales the rows.
    assert index.run_count == 3


@given(st.integers(0, len(GOOD) - 1))
def test_a_shorter_index_is_an_error(length: int) -> None:
    try:
        decode_index(GOOD[:length])
    except DataError:
        return
    raise AssertionError(f"{length} bytes were taken for the index")
