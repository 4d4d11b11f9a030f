"""The check whether the RAM in a snapshot shows one instant of the guest's writing.

The guest writes in a known order (``guests/common/page.h``): the changing words of a page by
address, the pages by index, one pass after another, each with its own counter. So at any instant
the words hold at most two consecutive counters, the larger one first, with one edge. Anything else
is a torn snapshot. The edge may lie inside a page that the guest was writing when it was stopped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import NamedTuple, TypeAlias

import msgspec

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap

PAGE_BYTES = 4096
MAGIC = b"StillframeGuest\n"
FLAG_WHOLE = 1
FIRST_FREE_WORD = 6
MIDDLE_WORD = 256
LAST_WORD = 511
PROBLEMS_KEPT = 20

_WORD = (1 << 64) - 1
_COUNTER_FACTOR = 0x9E3779B97F4A7C15
_INDEX_FACTOR = 0xC2B2AE3D27D4EB4F
_WORD_FACTOR = 0xD6E8FEB86659FD93
_COUNTER_INVERSE = pow(_COUNTER_FACTOR, -1, 1 << 64)
_HEADER = struct.Struct("<QQQQ")
_WHOLE = struct.Struct(f"<{LAST_WORD + 1 - FIRST_FREE_WORD}Q")
_LARGEST_COUNTER = 1 << 48
_RUNS_KEPT = 4


class ConsistencyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of :func:`check_pages`.

    ``pages``: pages found of the guest's working set; ``expected_pages``: as the pages declare.
    ``newer``: the counter at the beginning; the rest may hold ``newer - 1``.
    ``edge_page``, ``edge_word``: the first word with the older counter; None if all are newer.
    ``problems``: the first of ``problem_count`` reasons why this is not one instant.
    """

    pages: int
    expected_pages: int
    newer: int
    edge_page: int | None
    edge_word: int | None
    problems: tuple[str, ...]
    problem_count: int

    @property
    def consistent(self) -> bool:
        """Whether the pages are complete and show one instant."""
        return self.problem_count == 0

    def __str__(self) -> str:
        if self.consistent:
            edge = "none" if self.edge_page is None else f"page {self.edge_page}"
            return f"consistent: {self.pages} pages, pass {self.newer}, edge: {edge}"
        return f"TORN: {self.problem_count} problems in {self.pages} pages: " + "; ".join(
            self.problems
        )


def page_content(index: int, counter: int, pages: int, *, whole: bool = False) -> bytearray:
    """Make a page as the guest writes it in pass ``counter``, for tests and for comparison."""
    page = bytearray(PAGE_BYTES)
    page[:16] = MAGIC
    _HEADER.pack_into(page, 16, index, counter, pages, FLAG_WHOLE if whole else 0)
    words = range(FIRST_FREE_WORD, LAST_WORD + 1) if whole else (MIDDLE_WORD, LAST_WORD)
    for word in words:
        struct.pack_into("<Q", page, word * 8, _mix(counter, index, word))
    return page


def _mix(counter: int, index: int, word: int) -> int:
    base = (counter * _COUNTER_FACTOR & _WORD) ^ (index * _INDEX_FACTOR & _WORD)
    return (base + word * _WORD_FACTOR) & _WORD


def _counter_of(value: int, index: int, word: int) -> int:
    """Return the counter in a check word: the inverse of :func:`_mix`."""
    base = (value - word * _WORD_FACTOR) & _WORD
    return (base ^ (index * _INDEX_FACTOR & _WORD)) * _COUNTER_INVERSE & _WORD


def guest_pages(image: Buffer) -> Iterator[bytes]:
    """Yield the guest's pages in a piece of RAM that starts at a page boundary; skip all others.

    Args:
        image: bytes, a memory map, ... A trailing partial page is ignored.
    """
    with memoryview(image).cast("B") as view:
        whole_bytes = len(view) // PAGE_BYTES * PAGE_BYTES
        for offset_bytes in range(0, whole_bytes, PAGE_BYTES):
            if view[offset_bytes : offset_bytes + len(MAGIC)] == MAGIC:
                yield bytes(view[offset_bytes : offset_bytes + PAGE_BYTES])


def check_pages(pages: Iterable[Buffer]) -> ConsistencyReport:
    """Check the RAM of one snapshot, page by page, in any order.

    Args:
        pages: 4096 bytes each; those without the guest's magic are skipped. Pass every page of the
            snapshot exactly once: a repeated page is a problem.
    """
    found: dict[int, _Page] = {}
    problems = _Problems()
    for page in pages:
        with memoryview(page).cast("B") as view:
            if view[: len(MAGIC)] != MAGIC:
                continue
            content = bytes(view)
        if len(content) != PAGE_BYTES:
            problems.add(f"a page of the guest has {len(content)} bytes")
            continue
        index, counter, total, flags = _HEADER.unpack_from(content, len(MAGIC))
        if index in found:
            problems.add(f"page {index} is there twice")
            continue
        found[index] = _Page((total, flags), _runs(content, index, counter, flags))
    if not found:
        problems.add("no page of the guest was found")
        return problems.report(0, 0, 0, None)
    ordered = sorted(found)
    expected = found[ordered[0]].constants[0]
    newer = found[ordered[0]].runs[0][1]
    _check_indices(ordered, expected, problems)
    edge = _check_order(found, ordered, newer, problems)
    return problems.report(len(found), expected, newer, edge)


class _Page(NamedTuple):
    """A page's summary. ``constants``: total pages and flags. ``runs``: (first word, counter) of
    the first few stretches of words with the same counter, in the order of writing."""

    constants: tuple[int, int]
    runs: tuple[tuple[int, int], ...]


class _Problems:
    """A list of problems, of limited length; the count is not limited."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.texts) < PROBLEMS_KEPT:
            self.texts.append(text)

    def report(
        self, pages: int, expected: int, newer: int, edge: tuple[int, int] | None
    ) -> ConsistencyReport:
        return ConsistencyReport(
            pages=pages,
            expected_pages=expected,
            newer=newer,
            edge_page=edge[0] if edge else None,
            edge_word=edge[1] if edge else None,
            problems=tuple(self.texts),
            problem_count=self.count,
        )


def _check_indices(ordered: list[int], expected: int, problems: _Problems) -> None:
    position = 0
    for index in ordered:
        if index >= expected:
            problems.add(f"page {index} is there, but the guest has {expected} pages")
        elif index != position:
            problems.add(f"pages {position} to {index - 1} are missing")
        position = index + 1
    if position < expected:
        problems.add(f"pages {position} to {expected - 1} are missing")


def _check_order(
    found: dict[int, _Page], ordered: list[int], newer: int, problems: _Problems
) -> tuple[int, int] | None:
    """Check all words in the order of writing; return the edge as (page, word), if any."""
    constants = found[ordered[0]].constants
    edge: tuple[int, int] | None = None
    for index in ordered:
        page = found[index]
        if page.constants != constants:
            problems.add(f"page {index} has another header than page {ordered[0]}")
            continue
        for word, counter in page.runs:
            if counter == (newer if edge is None else newer - 1):
                continue
            if edge is None and counter == newer - 1:
                edge = (index, word)
                continue
            what = f"is of pass {counter}" if counter < _LARGEST_COUNTER else "is damaged"
            wanted = f"pass {newer} or {newer - 1}"
            if edge is not None:
                wanted = f"pass {newer - 1}, after the edge at page {edge[0]} word {edge[1]}"
            problems.add(f"page {index} word {word} {what}, not of {wanted}")
            break
    return edge


def _runs(content: bytes, index: int, counter: int, flags: int) -> tuple[tuple[int, int], ...]:
    runs = [(3, counter)]
    for word, value in _check_words(content, flags):
        if value == _mix(runs[-1][1], index, word):
            continue
        runs.append((word, _counter_of(value, index, word)))
        if len(runs) == _RUNS_KEPT:
            break
    return tuple(runs)


def _check_words(content: bytes, flags: int) -> Iterator[tuple[int, int]]:
    """Yield (number, value) of each changing word after the counter, in the order of writing."""
    if flags & FLAG_WHOLE:
        yield from enumerate(_WHOLE.unpack_from(content, FIRST_FREE_WORD * 8), FIRST_FREE_WORD)
    else:
        for word in (MIDDLE_WORD, LAST_WORD):
            yield word, int.from_bytes(content[word * 8 : word * 8 + 8], "little")
