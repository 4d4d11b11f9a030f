"""The difference between two snapshots: pages of RAM by block and region, devices by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import msgspec
from blake3 import blake3

from stillframe.errors import DataError, UsageError
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.page_classes import (
    DATA,
    MISSING,
    ZERO,
    page_classes,
    page_count,
    pages_of_ancestor,
)
from stillframe.still.records import record_bytes
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate.device_fields import Fields, Value, device_fields

_DIGEST_BYTES: Final = 16
_SAME, _CHANGED, _NEW, _ZEROED, _ABSENT = range(5)


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of the second snapshot's pages, compared with the first.

    ``same``: unchanged. ``changed``: other content. ``new``: content where the first has a zero
    page or no page. ``zeroed``: zero pages now. ``absent``: the second snapshot does not hold them.
    """

    same: int
    changed: int
    new: int
    zeroed: int
    absent: int = 0

    @property
    def different(self) -> int:
        return self.changed + self.new + self.zeroed + self.absent


class BlockDiff(msgspec.Struct, frozen=True, kw_only=True):
    """A block's difference. ``only_in``: the other snapshot lacks the block. ``ranges``: (first
    page, pages) that differ, in order; pages of ``page_bytes``."""

    idstr: str
    page_bytes: int
    used_length_bytes: tuple[int, int]
    only_in: Literal["a", "b"] | None
    pages: PageCounts
    ranges: tuple[tuple[int, int], ...]


class RegionDiff(msgspec.Struct, frozen=True, kw_only=True):
    """A guest-physical range that maps a part of one block."""

    gpa: int
    length_bytes: int
    idstr: str
    pages: PageCounts


class FieldDiff(msgspec.Struct, frozen=True, kw_only=True):
    """A field with both values; None if a snapshot lacks it."""

    path: str
    a: Value | None
    b: Value | None


class DeviceDiff(msgspec.Struct, frozen=True, kw_only=True):
    """A device that differs. ``bytes_changed``: how many bytes of its state differ, by position."""

    idstr: str
    instance: int
    only_in: Literal["a", "b"] | None
    bytes_changed: int
    fields: tuple[FieldDiff, ...]


class SnapshotDiff(msgspec.Struct, frozen=True, kw_only=True):
    """``a``, ``b``: the ids. ``devices``: those that differ; ``devices_same``: how many do not.
    ``is_descendant``: b is an increment on a, so only pages written since were compared."""

    a: str
    b: str
    is_descendant: bool
    blocks: tuple[BlockDiff, ...]
    regions: tuple[RegionDiff, ...]
    devices: tuple[DeviceDiff, ...]
    devices_same: int


def diff_snapshots(a: Snapshot, b: Snapshot) -> SnapshotDiff:
    """Compare two snapshots; pages that may differ are read from both.

    Raises:
        UsageError: their page sizes differ. DataError: one is damaged.
    """
    page_bytes = b.index.target_page_bytes
    if a.index.target_page_bytes != page_bytes:
        raise UsageError("the snapshots have pages of different sizes")
    blocks: list[BlockDiff] = []
    classes: dict[str, bytearray] = {}
    in_a = {block.idstr: number for number, block in enumerate(a.blocks)}
    for number, block in enumerate(b.blocks):
        found = _classify(a, in_a.get(block.idstr), b, number)
        classes[block.idstr] = found
        old = in_a.get(block.idstr)
        length = 0 if old is None else a.blocks[old].used_length_bytes
        blocks.append(
            BlockDiff(
                idstr=block.idstr,
                page_bytes=page_bytes,
                used_length_bytes=(length, block.used_length_bytes),
                only_in="b" if old is None else None,
                pages=_count(found),
                ranges=tuple(_ranges(found)),
            )
        )
    known = {block.idstr for block in b.blocks}
    for number, block in enumerate(a.blocks):
        if block.idstr not in known:
            pages = page_count(a, number)
            counts = PageCounts(same=0, changed=0, new=0, zeroed=0, absent=pages)
            blocks.append(
                BlockDiff(
                    idstr=block.idstr,
                    page_bytes=page_bytes,
                    used_length_bytes=(block.used_length_bytes, 0),
                    only_in="a",
                    pages=counts,
                    ranges=((0, pages),) if pages else (),
                )
            )
    devices, same = _devices(a, b)
    return SnapshotDiff(
        a=a.id,
        b=b.id,
        is_descendant=a.id in [file.id for file in b.files[1:]],
        blocks=tuple(blocks),
        regions=tuple(_regions(b, classes)),
        devices=tuple(devices),
        devices_same=same,
    )


def _classify(a: Snapshot, old: int | None, b: Snapshot, new: int) -> bytearray:
    """Return ``_SAME`` or another class for each page of the block in b."""
    now = page_classes(b, new)
    before = bytearray(len(now))
    if old is not None:
        before[:] = page_classes(a, old)[: len(now)].ljust(len(now), bytes((MISSING,)))
    shared = pages_of_ancestor(b, new, a.id)
    found = bytearray(len(now))
    to_compare = bytearray(len(now))
    for page, (was, kind) in enumerate(zip(before, now, strict=True)):
        if kind == MISSING:
            found[page] = _SAME if was == MISSING else _ABSENT
        elif kind == ZERO:
            found[page] = _SAME if was == ZERO else _ZEROED
        elif was != DATA:
            found[page] = _NEW
        elif not shared[page]:
            to_compare[page] = 1
    if old is not None and any(to_compare):
        digests = dict(_digests(b, new, to_compare))
        for page, digest in _digests(a, old, to_compare):
            found[page] = _SAME if digests[page] == digest else _CHANGED
    return found


def _digests(snapshot: Snapshot, number: int, wanted: bytearray) -> Iterator[tuple[int, bytes]]:
    """Yield (page, digest) of the wanted pages, all of which have content."""
    idstr = snapshot.blocks[number].idstr
    page_bytes = snapshot.index.target_page_bytes
    stride = record_bytes(KIND_DATA, page_bytes)

    def is_wanted(run: PageRun) -> bool:
        return wanted.find(1, run.first_page, run.first_page + run.pages) >= 0

    for run, content in snapshot.iter_runs(idstr, wanted=is_wanted):
        if content is None:
            continue
        for position in range(run.pages):
            if run.first_page + position < len(wanted) and wanted[run.first_page + position]:
                start = position * stride
                digest = blake3(content[start : start + page_bytes]).digest(_DIGEST_BYTES)
                yield run.first_page + position, digest


def _count(found: bytearray | memoryview) -> PageCounts:
    content = bytes(found)
    return PageCounts(
        same=content.count(_SAME),
        changed=content.count(_CHANGED),
        new=content.count(_NEW),
        zeroed=content.count(_ZEROED),
        absent=content.count(_ABSENT),
    )


def _ranges(found: bytearray) -> Iterator[tuple[int, int]]:
    first: int | None = None
    for page, kind in enumerate(found):
        if kind != _SAME and first is None:
            first = page
        elif kind == _SAME and first is not None:
            yield first, page - first
            first = None
    if first is not None:
        yield first, len(found) - first


def _regions(b: Snapshot, classes: dict[str, bytearray]) -> Iterator[RegionDiff]:
    page_bytes = b.index.target_page_bytes
    for part in sorted(b.manifest.memory_map, key=lambda part: part.gpa):
        if part.idstr not in classes:
            raise DataError(f"the memory map names a block {part.idstr!r} that is none")
        first, end = part.offset_bytes // page_bytes, part.offset_bytes + part.length_bytes
        pages = memoryview(classes[part.idstr])[first : -(-end // page_bytes)]
        yield RegionDiff(
            gpa=part.gpa, length_bytes=part.length_bytes, idstr=part.idstr, pages=_count(pages)
        )


def _devices(a: Snapshot, b: Snapshot) -> tuple[list[DeviceDiff], int]:
    """Return the devices that differ, in b's order and then a's; and how many do not."""
    before, after = a.skeleton(), b.skeleton()
    payloads = [
        {(s.idstr, s.instance_id): s.payload for s in skeleton.devices}
        for skeleton in (before, after)
    ]
    fields = [device_fields(skeleton.devices, skeleton.description) for skeleton in (before, after)]
    found: list[DeviceDiff] = []
    same = 0
    for key in dict.fromkeys([*payloads[1], *payloads[0]]):
        one, two = (payload.get(key) for payload in payloads)
        if one == two:
            same += 1
            continue
        before_bytes, after_bytes = one or b"", two or b""
        changed = sum(x != y for x, y in zip(before_bytes, after_bytes, strict=False))
        found.append(
            DeviceDiff(
                idstr=key[0],
                instance=key[1],
                only_in="b" if one is None else "a" if two is None else None,
                bytes_changed=changed + abs(len(before_bytes) - len(after_bytes)),
                fields=tuple(_fields(fields[0].get(key, {}), fields[1].get(key, {}))),
            )
        )
    return found, same


def _fields(one: Fields, two: Fields) -> Iterator[FieldDiff]:
    for path in dict.fromkeys([*one, *two]):
        if one.get(path) != two.get(path):
            yield FieldDiff(path=path, a=one.get(path), b=two.get(path))
