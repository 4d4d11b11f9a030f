"""Removal: what another snapshot or a VM needs stays; the catalog's entry goes first, then data.

A note says what is about to be removed. Who builds on a snapshot leaves a note first and looks for
this one afterwards, and we the other way round: so they cannot miss each other.
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
"""Who else needs a snapshot, in words: a VM, for instance."""


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """``removed``: what is gone; ``freed_bytes``: what it took. ``kept``: what stays, and for whom,
    by id."""

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
    """Remove snapshots, but none that is needed.

    Args:
        all_or_none: remove nothing if one of them has to stay.
        planned: with ``dry_run``: those that would have whole forms before.

    Raises:
        DataError: a catalog entry is damaged, so what needs what cannot be told.
        SinkError: the store cannot be written to.
    """
    notes: dict[str, str] = {}
    try:
        if not dry_run:
            for entry in wanted:
                notes[entry.id] = leave_note(backend, REMOVING, entry.name, entry.id)
        # Not before: what is begun from here on sees our notes. And in this order: who ends now
        # goes from the notes into the catalog.
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
        # Children first: at any moment every snapshot has its parents.
        for entry in sorted(going, key=lambda one: -len(_parents(catalog, one))):
            note = notes.pop(entry.id)  # from here on it stays until all is done
            backend.delete(catalog_key(entry.id))
            finish(backend, entry.name, entry.id, note)
        return Removal(removed=tuple(going), kept=kept, freed_bytes=_bytes(found, going))
    finally:
        for note in notes.values():
            backend.delete(note)


def _bytes(catalog: Catalog, entries: Collection[Entry]) -> int:
    return sum(catalog.own_bytes(entry) for entry in entries)


def as_if(catalog: Catalog, planned: Collection[Entry]) -> Catalog:
    """The catalog as it would be if these had whole forms."""
    wholes = {one.name: Beside(since_s=time.time(), bytes=0) for one in planned}
    return msgspec.structs.replace(catalog, wholes=catalog.wholes | wholes)


def _relied_on(backend: Backend, catalog: Catalog, needed_by: NeededBy) -> Catalog:
    """The catalog with those whole forms that all read by now who read the snapshot.

    Who opened an increment and its parents before goes on reading files that are removed; objects
    of a bucket he does not: there it takes a day, and VMs of this host must not need them.
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
    """Which of the snapshots that are to go have to stay, and for whom, by id.

    Args:
        begun: names of snapshots that somebody is at, or that one being taken builds on.

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
    # Whoever stays keeps what it builds on.
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
    """The entry is gone from the catalog: remove the rest, and the note last.

    Raises:
        SinkError: not permitted.
    """
    if not backend.listing(catalog_key(snapshot_id)):  # else it was put into the store anew
        for one in backend.listing(f"{TAGS}{snapshot_id}-"):
            backend.delete(one.key)
    delete_data(backend, name)
    backend.delete(note)


def settle_removals(backend: Backend) -> list[str]:
    """End what others began and did not end; returns the names of the snapshots.

    One that is still in the catalog stays: its removal had not begun.

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
    """Whether the snapshot is in the catalog; an entry that cannot be read may be its."""
    try:
        return small_objects.read(backend, catalog_key(note.about), Entry).name == note.name
    except NotFoundError:
        return False
    except DataError:
        return True
