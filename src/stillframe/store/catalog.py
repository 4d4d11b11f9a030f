"""What a store holds: one small object for each snapshot, and one for each tag of a snapshot.

There is no index that several writers would have to change: the catalog is what a listing shows.
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
    """The catalog at one time.

    ``entries``: by id, oldest first. ``tags``: those of each snapshot, sorted. ``damaged``: catalog
    objects that cannot be read, by id. ``wholes``: whole forms, by their snapshots' names.
    """

    entries: dict[str, Entry]
    tags: dict[str, tuple[str, ...]]
    damaged: dict[str, DataError]
    wholes: dict[str, Beside] = {}

    def is_whole(self, entry: Entry) -> bool:
        """Whether it needs no parent, or no longer."""
        return _is_whole(entry, self.wholes)

    def parent_of(self, entry: Entry) -> str | None:
        """Id of the snapshot that it needs; None if it is whole."""
        return None if self.is_whole(entry) else entry.parent

    def file_bytes(self, entry: Entry) -> int:
        """Of its file, and its whole form."""
        beside = self.wholes.get(entry.name)
        return entry.file_bytes + (0 if beside is None else beside.bytes)

    def own_bytes(self, entry: Entry) -> int:
        """What its objects take."""
        return self.file_bytes(entry) + entry.disks_bytes

    def children(self, snapshot_id: str) -> list[Entry]:
        """The snapshots that build on this one directly."""
        return [one for one in self.entries.values() if self.parent_of(one) == snapshot_id]

    def chain(self, entry: Entry) -> list[Entry]:
        """The snapshot and what it builds on, down to a full one.

        Raises:
            NotFoundError: a parent is not in the catalog. DataError: they go round in a ring.
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
        """The ids of all that build on a snapshot, directly or not."""
        found = {snapshot_id}
        while more := {e.id for e in self.entries.values() if self.parent_of(e) in found} - found:
            found |= more
        return found - {snapshot_id}


def _is_whole(entry: Entry, wholes: Mapping[str, Beside]) -> bool:
    beside = wholes.get(entry.name)
    return entry.parent is None or (beside is not None and beside.since_s is not None)


def read_catalog(backend: Backend) -> Catalog:
    """Read it all. What is removed meanwhile is not in it.

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
    """Put an entry where it belongs; whether there is one."""
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
    """No listing shows one moment: what came or went meanwhile may show without its parent."""
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
    """All tags by the id of their snapshot."""
    tags: dict[str, tuple[str, ...]] = {}
    for one in backend.listing(TAGS):
        snapshot_id, _, tag = one.key.removeprefix(TAGS).partition("-")
        if len(snapshot_id) == _ID_DIGITS and tag:
            tags[snapshot_id] = (*tags.get(snapshot_id, ()), tag)
    return tags
