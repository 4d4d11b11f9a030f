"""Removal: what another snapshot or a VM needs stays; the catalog entry goes first, then the data.

A note announces what is about to be removed. A job that builds on a snapshot leaves its own note
first and then looks for removal notes; a removal leaves its note first and then looks for such
jobs. So at least one of the two sees the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import msgspec

from stillframe.errors import DataError, NotFoundError
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.catalog import Catalog, read_catalog
from stillframe.store.records import CONFIG, PENDING, REMOVING, TAGS, Entry, catalog_key
from stillframe.store.wholes import Beside
from stillframe.store.workers import GIVEN_UP_S, Note, leave_note, read_notes
from stillframe.store.writing import delete_data

NeededBy = Callable[[Entry], str | None]
"""Returns who else needs a snapshot, in words: a VM, for instance; None if nobody."""


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a removal. ``removed``: what is gone; ``freed_bytes``: its size. ``kept``: what
    stays, by id, and for whom."""

    removed: tuple[Entry, ...] = ()
    kept: dict[str, str] = {}
    freed_bytes: int = 0


def remove(
    backend: Backend,
    wanted: Collection[Entry],
    needed_by: NeededBy,
    *,
    all_or_none: bool,
    dry_run: bool = False,
    planned: Collection[Entry] = (),
) -> Removal:
    """Remove snapshots, except those that are needed.

    Args:
        all_or_none: remove nothing if one of them has to stay.
        planned: with ``dry_run``: snapshots that would get whole forms first.

    Raises:
        DataError: a catalog entry is damaged, so dependencies are unknown.
        SinkError: the store cannot be written to.
    """
    notes: dict[str, str] = {}
    try:
        if not dry_run:
            for entry in wanted:
                notes[entry.id] = leave_note(backend, REMOVING, entry.name, entry.id)
        # Only now: jobs that start from here on see our notes. And notes before catalog: a job that
        # finishes in between moves from the notes to the catalog.
        at_work = [note for note in read_notes(backend, PENDING) if not note.worker.is_gone]
        begun = {name for note in at_work for name in (note.name, note.about)}
        found = as_if(read_catalog(backend), planned)
        catalog = _relied_on(backend, found, needed_by)
        wanted = [entry for entry in wanted if catalog.entries.get(entry.id) == entry]
        kept = what_stays(catalog, wanted, needed_by, begun)
        going = [entry for entry in wanted if entry.id not in kept]
        if dry_run or (kept and all_or_none):
            going = going if dry_run else []
            return Removal(removed=tuple(going), kept=kept, freed_bytes=_bytes(found, going))
        # Children first, so that every snapshot has its parents at any moment.
        for entry in sorted(going, key=lambda one: -len(_parents(catalog, one))):
            note = notes.pop(entry.id)  # kept from here on until the removal is complete
            backend.delete(catalog_key(entry.id))
            finish(backend, entry.name, entry.id, note)
        return Removal(removed=tuple(going), kept=kept, freed_bytes=_bytes(found, going))
    finally:
        for note in notes.values():
            backend.delete(note)


def _bytes(catalog: Catalog, entries: Collection[Entry]) -> int:
    return sum(catalog.own_bytes(entry) for entry in entries)


def as_if(catalog: Catalog, planned: Collection[Entry]) -> Catalog:
    """Return the catalog as it would be if these snapshots had whole forms."""
    wholes = {one.name: Beside(since_s=time.time(), bytes=0) for one in planned}
    return msgspec.structs.replace(catalog, wholes=catalog.wholes | wholes)


def _relied_on(backend: Backend, catalog: Catalog, needed_by: NeededBy) -> Catalog:
    """Return the catalog with only those whole forms that all readers use by now.

    A reader that opened an increment and its parents earlier can go on reading removed files, but
    not removed objects of a bucket. So in a bucket a whole form counts only after a day, and only
    if no VM of this host needs its chain.
    """
    if not catalog.wholes or backend.path(CONFIG) is not None:
        return catalog
    since_s = time.time() - GIVEN_UP_S
    old = {n: one for n, one in catalog.wholes.items() if one.since_s and one.since_s <= since_s}
    without = msgspec.structs.replace(catalog, wholes={})
    for entry in catalog.entries.values():
        chain = {one.name for one in (entry, *_parents(without, entry))}
        if chain & set(old) and needed_by(entry) is not None:
            old = {name: one for name, one in old.items() if name not in chain}
    return msgspec.structs.replace(catalog, wholes=old)


def what_stays(
    catalog: Catalog, wanted: Collection[Entry], needed_by: NeededBy, begun: Collection[str] = ()
) -> dict[str, str]:
    """Return which of the snapshots to remove have to stay, by id, and for whom.

    Args:
        begun: names of snapshots that a job works on or builds on.

    Raises:
        DataError: a catalog entry is damaged.
    """
    if catalog.damaged and wanted:
        one = next(iter(catalog.damaged))
        raise DataError(
            f"the catalog's entry of snapshot {one[:8]} is damaged",
            why="it cannot be told what it needs",
            remedy="run 'stillframe repair' first",
        )
    going = {entry.id for entry in wanted}
    kept: dict[str, str] = {}
    for entry in wanted:
        if entry.name in begun:
            kept[entry.id] = "a snapshot that is being taken"
        elif (who := needed_by(entry)) is not None:
            kept[entry.id] = who
    # A snapshot that stays keeps its parents.
    staying = [e for e in catalog.entries.values() if e.id not in going or e.id in kept]
    for entry in staying:
        for parent in _parents(catalog, entry):
            if parent.id in going:
                kept.setdefault(parent.id, f"snapshot {entry.label}")
    return kept


def _parents(catalog: Catalog, entry: Entry) -> list[Entry]:
    found: list[Entry] = []
    seen = {entry.id}
    while (parent := catalog.parent_of(entry)) in catalog.entries and parent not in seen:
        entry = catalog.entries[parent]
        seen.add(entry.id)
        found.append(entry)
    return found


def finish(backend: Backend, name: str, snapshot_id: str, note: str) -> None:
    """Remove the rest of a snapshot whose catalog entry is gone, and the note last.

    Raises:
        SinkError: not permitted.
    """
    if not backend.listing(catalog_key(snapshot_id)):  # else it was stored again
        for one in backend.listing(f"{TAGS}{snapshot_id}-"):
            backend.delete(one.key)
    delete_data(backend, name)
    backend.delete(note)


def settle_removals(backend: Backend) -> list[str]:
    """Complete the removals of dead processes; return the names of the snapshots.

    A snapshot that is still in the catalog stays: its removal had not begun.

    Raises:
        SinkError: not permitted.
    """
    settled = []
    for note in read_notes(backend, REMOVING):
        if not note.worker.is_gone:
            continue
        key = REMOVING + note.key
        if _stands(backend, note):
            backend.delete(key)
        else:
            finish(backend, note.name, note.about, key)
        settled.append(note.name)
    return settled


def _stands(backend: Backend, note: Note) -> bool:
    """Return whether the snapshot is in the catalog; True also for an unreadable entry."""
    try:
        return small_objects.read(backend, catalog_key(note.about), Entry).name == note.name
    except NotFoundError:
        return False
    except DataError:
        return True
