"""The catalog of a store: one small object per snapshot, and one per tag of a snapshot.

There is no shared index for writers to contend for: a listing of these objects is the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from stillframe.errors import DataError, NotFoundError
from stillframe.still.instant import instant_of
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.records import CATALOG, SNAPSHOTS, TAGS, Entry, catalog_key
from stillframe.store.wholes import Beside, listed

_ID_DIGITS = 64
_ID = re.compile(rf"[0-9a-f]{{{_ID_DIGITS}}}")


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """The catalog at one point in time.

    ``entries``: by id, oldest first. ``tags``: the tags of each snapshot, by id, sorted.
    ``damaged``: catalog objects that cannot be read, by id. ``wholes``: whole forms, by their
    snapshots' names.
    """

    entries: dict[str, Entry]
    tags: dict[str, tuple[str, ...]]
    damaged: dict[str, DataError]
    wholes: dict[str, Beside] = {}

    def is_whole(self, entry: Entry) -> bool:
        """Return whether the snapshot is full or has a whole form, so that it needs no parent."""
        return _is_whole(entry, self.wholes)

    def parent_of(self, entry: Entry) -> str | None:
        """Return the id of the snapshot that this one needs; None if it is whole."""
        return None if self.is_whole(entry) else entry.parent

    def file_bytes(self, entry: Entry) -> int:
        """Return the size of the snapshot's file and its whole form."""
        beside = self.wholes.get(entry.name)
        return entry.file_bytes + (0 if beside is None else beside.bytes)

    def own_bytes(self, entry: Entry) -> int:
        """Return the size of all the snapshot's objects."""
        return self.file_bytes(entry) + entry.disks_bytes

    def children(self, snapshot_id: str) -> list[Entry]:
        """Return the snapshots that build directly on this one."""
        return [one for one in self.entries.values() if self.parent_of(one) == snapshot_id]

    def chain(self, entry: Entry) -> list[Entry]:
        """Return the snapshot and its parents, down to a full one.

        Raises:
            NotFoundError: a parent is not in the catalog. DataError: the chain is a cycle.
        """
        chain = [entry]
        while (parent_id := self.parent_of(chain[-1])) is not None:
            parent = self.entries.get(parent_id)
            if parent is None:
                raise NotFoundError(
                    f"the parent of snapshot {chain[-1].label} is not in the store",
                    why=f"its id is {parent_id}",
                    remedy="'stillframe check' says what else is missing",
                )
            if parent in chain:
                raise DataError(f"snapshot {entry.label} builds on itself")
            chain.append(parent)
        return chain

    def family_of(self, snapshot_id: str) -> set[str]:
        """Return the ids of all snapshots that build on this one, directly or not."""
        found = {snapshot_id}
        while more := {e.id for e in self.entries.values() if self.parent_of(e) in found} - found:
            found |= more
        return found - {snapshot_id}


def _is_whole(entry: Entry, wholes: Mapping[str, Beside]) -> bool:
    beside = wholes.get(entry.name)
    return entry.parent is None or (beside is not None and beside.since_s is not None)


def read_catalog(backend: Backend) -> Catalog:
    """Read the whole catalog. Snapshots removed while it is read are left out.

    Raises:
        HostError: not permitted.
    """
    entries: dict[str, Entry] = {}
    damaged: dict[str, DataError] = {}
    for one in backend.listing(CATALOG):
        _add(backend, one.key.removeprefix(CATALOG).removesuffix(".json"), entries, damaged)
    wholes = listed(backend.listing(SNAPSHOTS))
    _settle(backend, entries, damaged, wholes)
    in_order = sorted(entries.values(), key=lambda entry: (entry.time, entry.id))
    return Catalog(
        entries={entry.id: entry for entry in in_order},
        tags=read_tags(backend),
        damaged=damaged,
        wholes=wholes,
    )


def _add(
    backend: Backend, snapshot_id: str, entries: dict[str, Entry], damaged: dict[str, DataError]
) -> bool:
    """Read an entry into ``entries`` or ``damaged``; return whether it exists."""
    key = catalog_key(snapshot_id)
    try:
        entry = small_objects.read(backend, key, Entry)
        instant_of(entry.created)
    except NotFoundError:
        return False
    except DataError as error:
        damaged[snapshot_id] = error
        return True
    if entry.id != snapshot_id:
        damaged[snapshot_id] = DataError(f"{key} is the entry of snapshot {entry.id}")
    elif entry.parent is not None and not _ID.fullmatch(entry.parent):
        damaged[snapshot_id] = DataError(f"{key} names a parent that is none: {entry.parent!r}")
    else:
        entries[entry.id] = entry
    return True


def _settle(
    backend: Backend,
    entries: dict[str, Entry],
    damaged: dict[str, DataError],
    wholes: Mapping[str, Beside],
) -> None:
    """Read parents that are missing, and drop entries that are gone: no listing is atomic, so what
    came or went meanwhile may appear without its parent."""
    left = list(entries.values())
    while left:
        entry = left.pop()
        if entry.id not in entries:
            continue
        if entry.parent is None or _is_whole(entry, wholes):
            continue
        if entry.parent in entries or entry.parent in damaged:
            continue
        if _add(backend, entry.parent, entries, damaged):
            left += [entries[one] for one in (entry.parent,) if one in entries]
        elif not _add(backend, entry.id, entries, damaged):
            del entries[entry.id]
            left += [one for one in entries.values() if one.parent == entry.id]


def read_tags(backend: Backend) -> dict[str, tuple[str, ...]]:
    """Return all tags, by the id of their snapshot."""
    tags: dict[str, tuple[str, ...]] = {}
    for one in backend.listing(TAGS):
        snapshot_id, _, tag = one.key.removeprefix(TAGS).partition("-")
        if len(snapshot_id) == _ID_DIGITS and tag:
            tags[snapshot_id] = (*tags.get(snapshot_id, ()), tag)
    return tags
