"""Finding where device sections end, by their footers.

The stream has no section lengths: a device's payload is whatever its handler wrote, and
only the footer (``7e`` and the section's own id, big-endian) follows. A payload may contain
these five bytes by chance or because a guest put them there, so one footer proves nothing;
a chain of sections that covers the data exactly up to its end does. Format: QEMU
``migration/savevm.c``, ``save_section_header`` and ``save_section_footer``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from stillframe.errors import DataError
from stillframe.vmstate.wire import SectionType

FOOTER_BYTES = 5
BOUNDARY_LIMIT = 1 << 16
"""Real streams have one boundary per section. More than this many are an attack."""
STEP_LIMIT = 1 << 17
VERSION_LIMIT = 0xFFFF

_HEAD = Struct(">BIB")
_TAIL = Struct(">II")
_BOUNDARY = re.compile(rb"\x7e(?=(.{4})\x04.{4}[^\x00][ -~])", re.DOTALL)
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
    """A whole section: header, where its payload ends, and where the next thing starts."""

    header: SectionHeader
    payload_end: int
    end: int


class _Boundary(NamedTuple):
    footer: int
    next_header: SectionHeader | None


def read_header(data: bytes | memoryview, start: int) -> SectionHeader | None:
    """Parse the START or FULL header at ``start``; None if it is not a plausible one."""
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


class _ChainSearch:
    """All possible boundaries of the data, and which of them lead to its end.

    Boundaries are looked at from the last to the first, so for each it is known at once
    whether any chain leads on from it: time is linear in the data and ``n log n`` in the
    boundaries, whatever the data holds.
    """

    def __init__(self, data: bytes, start: int, eof: int, data_offset: int) -> None:
        self.data = data
        self.data_offset = data_offset
        self.ways: dict[int, list[_Boundary]] = {}
        """Boundaries that lead to the end, by the footer's id, last one first."""
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
        """Footers that another section's header follows."""
        found: list[_Boundary] = []
        for match in _BOUNDARY.finditer(self.data, start, eof):
            footer = match.start()
            header = read_header(self.data, footer + FOOTER_BYTES)
            if header is None:
                continue
            if len(found) == BOUNDARY_LIMIT:
                raise DataError(
                    "the device sections are not a real VM's",
                    why=f"more than {BOUNDARY_LIMIT} places could be the end of a section",
                    offset_bytes=self.data_offset + footer,
                )
            found.append(_Boundary(footer, header))
        return found

    def leads_on(self, header: SectionHeader) -> bool:
        """Whether any chain goes from this section to the data's end."""
        return self._count(header) > 0

    def onward(self, header: SectionHeader) -> Iterator[_Boundary]:
        """Where this section may end so that the chain still reaches the data's end."""
        boundaries = self.ways.get(header.section_id, [])
        for index in reversed(range(self._count(header))):
            yield boundaries[index]

    def _count(self, header: SectionHeader) -> int:
        positions = self._positions.get(header.section_id, [])
        return bisect_right(positions, -header.payload_start)


def find_chain(
    data: bytes, start: int, *, eof: int, data_offset: int = 0
) -> tuple[SectionSpan, ...]:
    """Split FULL sections that follow each other from ``start`` to ``eof``.

    Args:
        data: everything from the first section to the end of the stream.
        start: byte offset of the first section's type byte.
        eof: byte offset of the EOF byte that ends the device sections.
        data_offset: where ``data`` is in the stream, for errors.

    Raises:
        DataError: there is no such chain, or more than one with unique ids and names
            (a guest may have planted one in a device's buffer), or the data makes the
            search unreasonably long.
    """
    first = read_header(data, start)
    if first is None or data[start] != SectionType.FULL:
        raise DataError("no device section where one must start", offset_bytes=data_offset + start)
    search = _ChainSearch(data, start, eof, data_offset)
    paths = _paths(search, first)
    if len(paths) > 1:
        raise DataError(
            "the device sections can be read in more than one way",
            why="a device's state contains what looks like the end of its section",
            remedy="take the snapshot again, when the guest has moved on",
            offset_bytes=data_offset + start,
        )
    if not paths and search.leads_on(first):
        raise DataError(
            "two device sections have the same id or the same name",
            why="the device state is damaged",
            offset_bytes=data_offset + start,
        )
    if not paths:
        raise _lost(data, first, data_offset)
    return paths[0]


def _paths(search: _ChainSearch, first: SectionHeader) -> list[tuple[SectionSpan, ...]]:
    """At most two chains in which section ids and (idstr, instance) are unique."""
    paths: list[tuple[SectionSpan, ...]] = []
    headers = [first]
    ends: list[int] = []
    choices = [search.onward(first)]
    ids = {first.section_id}
    names = {(first.idstr, first.instance_id)}
    steps = 0
    while choices and len(paths) < 2:
        steps += 1
        if steps > STEP_LIMIT:
            raise DataError(
                "the device sections are not a real VM's",
                why="they can be read in too many ways",
                offset_bytes=search.data_offset + first.start,
            )
        boundary = next(choices[-1], None)
        if boundary is None:
            choices.pop()
            gone = headers.pop()
            ids.discard(gone.section_id)
            names.discard((gone.idstr, gone.instance_id))
            if ends:
                ends.pop()
            continue
        following = boundary.next_header
        if following is None:
            closed = [*ends, boundary.footer]
            paths.append(
                tuple(
                    SectionSpan(h, e, e + FOOTER_BYTES)
                    for h, e in zip(headers, closed, strict=True)
                )
            )
            continue
        name = (following.idstr, following.instance_id)
        if following.section_id in ids or name in names:
            continue
        ids.add(following.section_id)
        names.add(name)
        headers.append(following)
        ends.append(boundary.footer)
        choices.append(search.onward(following))
    return paths


def _lost(data: bytes, first: SectionHeader, data_offset: int) -> DataError:
    """Say at which section the chain broke: follow the first plausible footers."""
    header = first
    while True:
        footer_bytes = b"\x7e" + header.section_id.to_bytes(4, "big")
        footer = data.find(footer_bytes, header.payload_start)
        following = None
        while footer >= 0:
            after = footer + FOOTER_BYTES
            if data[after : after + 1] == b"\x04":
                following = read_header(data, after)
                if following is not None:
                    break
            footer = data.find(footer_bytes, footer + 1)
        if following is None:
            break
        header = following
    if header is first and data.find(footer_bytes, header.payload_start) < 0:
        return DataError(
            "the device sections have no footers",
            why=f"section '{header.idstr}' is not followed by one: the machine was started with "
            "send-section-footer off, or the data is damaged",
            remedy="start it without -global migration.send-section-footer=off",
            offset_bytes=data_offset + header.payload_start,
        )
    return DataError(
        f"device section '{header.idstr}' does not end",
        why="the device state is truncated or damaged",
        offset_bytes=data_offset + header.start,
    )
