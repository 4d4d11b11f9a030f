"""The catalog for display: a tree over time, with what each snapshot shares."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from stillframe.store.catalog import Catalog
from stillframe.store.records import Entry
from stillframe.store.retention import by_vm


class ListedSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot in the listing. ``entry``: its catalog entry. ``depth``: its depth in the tree: 0
    for a full snapshot; its descendants follow it, and the depth grows where the line starts or
    branches. ``own_bytes``: size of all its own objects, including a whole form. ``is_whole``: it
    needs no parent. ``shared_bytes``: size of the files it needs that other snapshots need, too."""

    entry: Entry
    tags: tuple[str, ...]
    depth: int
    own_bytes: int
    is_whole: bool
    shared_bytes: int


def listing(catalog: Catalog, vms: Collection[str] = ()) -> list[ListedSnapshot]:
    """List the snapshots of these VMs, or of all: grouped by VM, oldest first, children below their
    parents."""
    found: list[ListedSnapshot] = []
    for vm, entries in sorted(by_vm(catalog.entries.values()).items()):
        if vms and vm not in vms:
            continue
        waiting = [(e, 0) for e in reversed(entries) if catalog.parent_of(e) not in catalog.entries]
        while waiting:
            entry, depth = waiting.pop()
            children = catalog.children(entry.id)
            found.append(
                ListedSnapshot(
                    entry=entry,
                    tags=catalog.tags.get(entry.id, ()),
                    depth=depth,
                    own_bytes=catalog.own_bytes(entry),
                    is_whole=catalog.is_whole(entry),
                    shared_bytes=_shared_bytes(catalog, entry, bool(children)),
                )
            )
            deeper = depth + (len(children) > 1 or depth == 0)
            waiting += [(child, deeper) for child in reversed(children)]
    return found


def _shared_bytes(catalog: Catalog, entry: Entry, has_children: bool) -> int:
    shared, at, seen = catalog.file_bytes(entry) if has_children else 0, entry, {entry.id}
    while (parent := catalog.parent_of(at)) in catalog.entries and parent not in seen:
        at = catalog.entries[parent]
        seen.add(at.id)
        shared += catalog.file_bytes(at)
    return shared
