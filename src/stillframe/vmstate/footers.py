"""The boundaries of device sections in a stream's tail.

The stream states no section lengths. A section ends with a footer (``7e`` and its own id,
big-endian) unless the machine has ``send-section-footer`` off, as all machine types up to 2.3 have.
Guest data in a payload may look like a footer or a header, so a single footer proves nothing; a
chain of sections up to the very end of the data does. Format: QEMU ``migration/savevm.c``,
``save_section_header`` and ``save_section_footer``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from struct import Struct
from typing import NamedTuple

from stillframe.errors import DataError
from stillframe.vmstate.wire import SectionType

FOOTER_BYTES = 5
BOUNDARY_LIMIT = 1 << 16
"""A stream has one boundary per section; one with more than this is hostile."""
STEP_LIMIT = 1 << 17
CHAIN_LIMIT = 64
VERSION_LIMIT = 0x7FFFFFFF
"""QEMU's ``version_id`` is an int; the ``eeprom`` section's is 20061112."""

_HEAD = Struct(">BIB")
_TAIL = Struct(">II")
HEADER_LIMIT_BYTES = _HEAD.size + 255 + _TAIL.size
_BOUNDARY = re.compile(rb"\x7e(?=.{4}\x04.{4}[^\x00][ -~])", re.DOTALL)
_HEADER = re.compile(rb"\x04(?=\x00\x00..[^\x00][0-9A-Za-z/])", re.DOTALL)
_PRINTABLE = re.compile(rb"[ -~]+")


class SectionHeader(NamedTuple):
    """Header of a START or FULL section; positions are byte offsets in the data searched."""

    start: int
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    payload_start: int


class SectionSpan(NamedTuple):
    """A whole section: its header, the end of its payload, and the start of what follows it."""

    header: SectionHeader
    payload_end: int
    end: int


class _Boundary(NamedTuple):
    footer: int
    next_header: SectionHeader | None


def read_header(data: bytes | memoryview, start: int) -> SectionHeader | None:
    """Parse the START or FULL header at ``start``; None if it is not plausible."""
    fixed_end = start + _HEAD.size
    if fixed_end > len(data):
        return None
    _, section_id, name_length = _HEAD.unpack_from(data, start)
    name_end = fixed_end + name_length
    if name_length == 0 or name_end + _TAIL.size > len(data):
        return None
    name = bytes(data[fixed_end:name_end])
    if _PRINTABLE.fullmatch(name) is None:
        return None
    instance_id, version_id = _TAIL.unpack_from(data, name_end)
    if version_id > VERSION_LIMIT:
        return None
    return SectionHeader(
        start, section_id, name.decode("ascii"), instance_id, version_id, name_end + _TAIL.size
    )


def cut_sections(
    data: bytes,
    start: int,
    *,
    eof: int,
    essential: Callable[[str], bool],
    footers: bool | None = None,
    data_offset: int = 0,
) -> tuple[SectionSpan, ...]:
    """Cut the FULL sections that follow each other from ``start`` to ``eof``.

    If the data has several readings, take one of those with the fewest repeated names: QEMU up to
    7.2 registers every user network as ``slirp``, instance 0. The bytes and their order are the
    same in all readings.

    Args:
        data: everything from the first section to the end of the stream.
        start: byte offset of the first section's type byte.
        eof: byte offset of the EOF byte that ends the device sections.
        essential: whether a section of this name must be the same in all readings.
        footers: whether sections have footers; None to find out.
        data_offset: the offset of ``data`` in the stream, for errors.

    Raises:
        DataError: there is no reading, or the readings differ in an essential section (a guest may
            have planted one in a device's buffer), or there are unreasonably many.
    """
    first = read_header(data, start)
    if first is None or data[start] != SectionType.FULL:
        raise DataError("no device section where one must start", offset_bytes=data_offset + start)
    if footers is False:
        return _spans_between(_headers(data, first, eof, data_offset), eof)
    search = _ChainSearch(data, start, eof, data_offset)
    if search.leads_on(first):
        chains = _chains(search, first)
        if chains:
            return _choose(chains, essential, data_offset + start)
        raise DataError(
            "two device sections have the same id",
            why="the device state is damaged",
            offset_bytes=data_offset + start,
        )
    headers = _headers(data, first, eof, data_offset)
    if footers is None and len(headers) > 1 and not _any_footer(data, headers, eof):
        return _spans_between(headers, eof)
    lost = _last_with_footer(data, headers)
    raise DataError(
        f"device section '{lost.idstr}' does not end",
        why="the device state is truncated or damaged",
        offset_bytes=data_offset + lost.start,
    )


class _ChainSearch:
    """All possible boundaries in the data, and which of them lead to its end.

    The search goes from the last boundary to the first, so it knows at once whether any chain leads
    on from one: time is linear in the data and ``n log n`` in the boundaries, whatever the data
    holds.
    """

    def __init__(self, data: bytes, start: int, eof: int, data_offset: int) -> None:
        self.data = data
        self.data_offset = data_offset
        self.ways: dict[int, list[_Boundary]] = {}
        """Boundaries that lead to the end, by the footer's id, the last one first."""
        self._positions: dict[int, list[int]] = {}
        last = eof - FOOTER_BYTES
        if data[last] == SectionType.FOOTER:
            self._add(_Boundary(last, None))
        for boundary in reversed(self._candidates(start, eof)):
            if boundary.next_header is not None and self.leads_on(boundary.next_header):
                self._add(boundary)

    def _add(self, boundary: _Boundary) -> None:
        footer = boundary.footer
        section_id = int.from_bytes(self.data[footer + 1 : footer + FOOTER_BYTES], "big")
        self.ways.setdefault(section_id, []).append(boundary)
        self._positions.setdefault(section_id, []).append(-footer)

    def _candidates(self, start: int, eof: int) -> list[_Boundary]:
        """Return the footers that another section's header follows."""
        found: list[_Boundary] = []
        for match in _BOUNDARY.finditer(self.data, start, eof):
            footer = match.start()
            header = read_header(self.data, footer + FOOTER_BYTES)
            if header is not None:
                if len(found) == BOUNDARY_LIMIT:
                    raise _too_many(BOUNDARY_LIMIT, self.data_offset + footer)
                found.append(_Boundary(footer, header))
        return found

    def leads_on(self, header: SectionHeader) -> bool:
        """Return whether any chain goes from this section to the data's end."""
        return self._count(header) > 0

    def onward(self, header: SectionHeader) -> Iterator[_Boundary]:
        """Yield each place where this section may end so that the chain still reaches the data's
        end."""
        boundaries = self.ways.get(header.section_id, [])
        for index in reversed(range(self._count(header))):
            yield boundaries[index]

    def _count(self, header: SectionHeader) -> int:
        positions = self._positions.get(header.section_id, [])
        return bisect_right(positions, -header.payload_start)


def _chains(search: _ChainSearch, first: SectionHeader) -> list[tuple[SectionSpan, ...]]:
    """Return all chains in which section ids are unique."""
    chains: list[tuple[SectionSpan, ...]] = []
    headers = [first]
    ends: list[int] = []
    choices = [search.onward(first)]
    ids = {first.section_id}
    steps = 0
    while choices:
        steps += 1
        if steps > STEP_LIMIT or len(chains) > CHAIN_LIMIT:
            raise DataError(
                "the device sections are not a real VM's",
                why="they can be read in too many ways",
                offset_bytes=search.data_offset + first.start,
            )
        boundary = next(choices[-1], None)
        if boundary is None:
            choices.pop()
            ids.discard(headers.pop().section_id)
            if ends:
                ends.pop()
        elif boundary.next_header is None:
            closed = zip(headers, [*ends, boundary.footer], strict=True)
            chains.append(tuple(SectionSpan(h, e, e + FOOTER_BYTES) for h, e in closed))
        elif boundary.next_header.section_id not in ids:
            ids.add(boundary.next_header.section_id)
            headers.append(boundary.next_header)
            ends.append(boundary.footer)
            choices.append(search.onward(boundary.next_header))
    return chains


def _choose(
    chains: list[tuple[SectionSpan, ...]], essential: Callable[[str], bool], offset_bytes: int
) -> tuple[SectionSpan, ...]:
    names = [len({(s.header.idstr, s.header.instance_id) for s in chain}) for chain in chains]
    repeated = [len(chain) - count for chain, count in zip(chains, names, strict=True)]
    best = [c for c, count in zip(chains, repeated, strict=True) if count == min(repeated)]
    if len({tuple(s for s in chain if essential(s.header.idstr)) for chain in best}) > 1:
        raise DataError(
            "the device sections can be read in more than one way",
            why="a device's state contains what looks like a section's end",
            remedy="take another snapshot a moment later",
            offset_bytes=offset_bytes,
        )
    return best[0]


def _headers(data: bytes, first: SectionHeader, eof: int, data_offset: int) -> list[SectionHeader]:
    """Return whatever looks like a section's header outside of other headers, each id once."""
    found = [first]
    ids = {first.section_id}
    for number, match in enumerate(_HEADER.finditer(data, first.payload_start, eof)):
        if number == STEP_LIMIT:
            raise _too_many(STEP_LIMIT, data_offset + match.start())
        header = read_header(data, match.start())
        if (
            header is not None
            and header.section_id not in ids
            and found[-1].payload_start <= header.start
            and header.payload_start <= eof
        ):
            found.append(header)
            ids.add(header.section_id)
    return found


def _spans_between(headers: list[SectionHeader], eof: int) -> tuple[SectionSpan, ...]:
    """Sections without footers: each ends where the next one starts."""
    ends = [*(header.start for header in headers[1:]), eof]
    return tuple(SectionSpan(h, end, end) for h, end in zip(headers, ends, strict=True))


def _any_footer(data: bytes, headers: list[SectionHeader], eof: int) -> bool:
    """Return whether any section ends with a footer."""
    ids = {header.section_id for header in headers}
    return any(_footer_id(data, end) in ids for end in (*(h.start for h in headers[1:]), eof))


def _last_with_footer(data: bytes, headers: list[SectionHeader]) -> SectionHeader:
    """Return the section at which the chain broke: the first without a footer before the next
    header."""
    for header, following in pairwise(headers):
        if _footer_id(data, following.start) != header.section_id:
            return header
    return headers[-1]


def _footer_id(data: bytes, end: int) -> int | None:
    """Return the id in the footer that ends at ``end``; None if no footer ends there."""
    footer = data[max(end - FOOTER_BYTES, 0) : end]
    is_footer = len(footer) == FOOTER_BYTES and footer[0] == SectionType.FOOTER
    return int.from_bytes(footer[1:], "big") if is_footer else None


def _too_many(limit: int, offset_bytes: int) -> DataError:
    return DataError(
        "the device sections are not a real VM's",
        why=f"more than {limit} places could be the end of a section",
        offset_bytes=offset_bytes,
    )
