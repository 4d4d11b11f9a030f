"""The repair of a store: a catalog rebuilt from the snapshots' files, dead processes' leftovers
gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import msgspec

from stillframe.errors import BusyError, DataError, NotFoundError, StillframeError
from stillframe.model import FrozenFile
from stillframe.store.backends.objects import Backend
from stillframe.store.catalog import Catalog, read_catalog, read_tags
from stillframe.store.check import CheckReport, Progress, check_store, damage
from stillframe.store.records import (
    PENDING,
    REMOVING,
    SNAPSHOTS,
    Entry,
    catalog_key,
    data_key,
    entry_of,
    name_of,
    new_name,
    own_disks,
    tag_key,
)
from stillframe.store.removing import NeededBy, Removal, remove, settle_removals
from stillframe.store.sealed_backend import open_stored
from stillframe.store.store import Store, nobody
from stillframe.store.wholes import (
    WholeForm,
    enter_form,
    nonce_of,
    open_form,
    pointer_key,
    read_pointer,
)
from stillframe.store.workers import leave_note, read_notes
from stillframe.store.writing import check_stays, delete_data, enter


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a repair. ``done``: the repairs, in words. ``lost``: what each snapshot has lost,
    by id, in words; ``labels``: those snapshots' names in messages. ``forgotten``: ids of the
    snapshots that were given up; ``needed``: those that could not be, by id, and who needs them."""

    done: tuple[str, ...]
    lost: dict[str, list[str]]
    labels: dict[str, str]
    forgotten: tuple[str, ...] = ()
    needed: dict[str, str] = {}


def repair_store(
    store: Store,
    *,
    read_data: float = 0.0,
    forget: bool = False,
    needed_by: NeededBy = nobody,
    already_done: Sequence[str] = (),
    progress: Progress | None = None,
) -> Repair:
    """Repair what can be repaired without loss, and report what is lost.

    Args:
        store: if it is append-only, objects of dead processes stay.
        read_data: share of the data to read in search of losses.
        forget: also remove snapshots that have lost something, except those that a sound one needs.
        needed_by: who else needs a snapshot, such as a VM that runs from it.

    Raises:
        SinkError: the store cannot be written to. HostError: not permitted.
        RefusedError: ``forget``, and the store is append-only.
    """
    backend, may_remove = store.backend, not store.config.append_only
    if forget:
        store.check_may_remove()
    done = list(already_done)
    if may_remove:
        done += [f"ended the removal of {name}" for name in settle_removals(backend)]
    done += _adopt(backend)
    done += _adopt_whole_forms(backend)
    if may_remove:
        done += _clear(backend)
    report = check_store(backend, read_data=read_data, progress=progress)
    if may_remove:
        done += _drop_whole_forms(backend, report)
    needed = _forget(backend, report, needed_by).kept if forget else {}
    return Repair(
        done=tuple(done),
        lost=report.lost,
        labels=report.labels,
        forgotten=tuple(one for one in report.lost if forget and one not in needed),
        needed=needed,
    )


def _adopt(backend: Backend) -> list[str]:
    """Enter snapshots that are whole and have no catalog entry, or a wrong one; parents before
    children."""
    done: list[str] = []
    names = {name_of(one.key) for one in backend.listing(SNAPSHOTS)} - {""}
    while True:
        notes = [*read_notes(backend, PENDING), *read_notes(backend, REMOVING)]
        names -= {note.name for note in notes if not note.worker.is_gone}
        catalog = read_catalog(backend)
        found = [e for name in sorted(names) if (e := _to_enter(backend, catalog, name))]
        if not found:
            return done
        for entry in found:
            names.discard(entry.name)
            try:
                _enter_anew(backend, catalog, entry)
                done.append(f"entered snapshot {entry.label} in the catalog")
            except (BusyError, NotFoundError, DataError) as error:
                damage(error)


def _to_enter(backend: Backend, catalog: Catalog, name: str) -> Entry | None:
    """Return the entry that a snapshot lacks; None if its entry is right, or if it is not whole."""
    try:
        entry, disks = _read(backend, name)
    except (NotFoundError, DataError) as error:
        damage(error)
        return None
    there = {one.key: one.bytes for one in backend.listing(data_key(name))}
    if any(there.get(key) != file.size_bytes for key, file in disks):
        return None
    known = catalog.entries.get(entry.id)
    if known == entry or (known is not None and known.name != name):
        return None
    if entry.parent in catalog.entries or entry.parent is None:
        return entry
    try:
        with open_form(backend, name) as file:
            return entry if file.stands_in else None
    except (NotFoundError, DataError) as error:
        damage(error)
        return None


def _read(backend: Backend, name: str) -> tuple[Entry, list[tuple[str, FrozenFile]]]:
    with open_stored(backend, data_key(name)) as file:
        return entry_of(file, name), own_disks(file.manifest, name)


def _enter_anew(backend: Backend, catalog: Catalog, entry: Entry) -> None:
    """Replace a snapshot's entry. Raises BusyError or NotFoundError if it or its parent is being
    removed."""
    parent = catalog.entries.get(entry.parent or "")
    key = leave_note(backend, PENDING, entry.name, "" if parent is None else parent.name)
    try:
        # Note first, then check: a removal that we do not see sees us.
        if backend.listing(f"{REMOVING}{entry.name}."):
            raise BusyError(f"snapshot {entry.label} is being removed")
        if parent is not None:
            check_stays(backend, parent)
        _read(backend, entry.name)
        backend.delete(catalog_key(entry.id))  # a damaged or a wrong one
        enter(backend, entry)
    finally:
        with contextlib.suppress(StillframeError):
            backend.delete(key)


def _adopt_whole_forms(backend: Backend) -> list[str]:
    """Enter whole forms of compactions that died before entering them."""
    done: list[str] = []
    data = [one.key for one in backend.listing(SNAPSHOTS) if nonce_of(one.key)]
    at_work = {n.about for n in read_notes(backend, PENDING) if not n.worker.is_gone}
    of_name = {entry.name: entry for entry in read_catalog(backend).entries.values()}
    for key in data:
        entry = of_name.get(name_of(key))
        if entry is None or entry.name in at_work:
            continue
        pointer = pointer_key(data_key(entry.name))
        with contextlib.suppress(NotFoundError, DataError, BusyError):
            try:
                if read_pointer(backend, entry.name) is not None:
                    continue
            except DataError as error:
                damage(error)
            with _noted(backend, entry.name), open_stored(backend, key) as file:
                check_stays(backend, entry)
                if file.manifest.whole_of == entry.id:
                    backend.delete(pointer)  # a damaged one
                    enter_form(backend, entry.name, WholeForm(id=entry.id, nonce=nonce_of(key)))
                    done.append(f"entered the whole form of snapshot {entry.label}")
    return done


def _drop_whole_forms(backend: Backend, report: CheckReport) -> list[str]:
    """Remove damaged whole forms whose increment and parent exist, with all their data."""
    done: list[str] = []
    catalog = read_catalog(backend)
    of_name = {entry.name: entry for entry in catalog.entries.values()}
    for name in {name_of(f.key) for f in report.findings if f.kind == "whole"} & set(of_name):
        entry = of_name[name]
        parent = catalog.entries.get(entry.parent or "")
        if parent is None:
            continue
        # Note first, then check: either the parent's removal sees our note, or we see its.
        with contextlib.suppress(BusyError), _noted(backend, parent.name):
            check_stays(backend, parent)
            for one in backend.listing(pointer_key(data_key(name))):  # the pointer comes first
                backend.delete(one.key)
            done.append(f"removed the damaged whole form of snapshot {entry.label}")
    return done


@contextlib.contextmanager
def _noted(backend: Backend, about: str) -> Iterator[None]:
    key = leave_note(backend, PENDING, new_name(), about)
    try:
        yield
    finally:
        with contextlib.suppress(StillframeError):
            backend.delete(key)


def _clear(backend: Backend) -> list[str]:
    """Remove what dead processes left and nothing can use."""
    done: list[str] = []
    # In this order: a writer leaves its note, then data, then the entry, then drops the note.
    data = backend.listing(SNAPSHOTS)
    pending, removing = (read_notes(backend, prefix) for prefix in (PENDING, REMOVING))
    catalog = read_catalog(backend)
    named = {entry.name for entry in catalog.entries.values()}
    files = {name_of(one.key) for one in data if one.key == data_key(name_of(one.key))}
    busy = {note.name for note in (*pending, *removing) if not note.worker.is_gone}
    for name in sorted({name_of(one.key) for one in data} - files - named - busy - {""}):
        delete_data(backend, name)
        done.append(f"removed the disks of a snapshot that was never finished ({name})")
    for note in pending:
        # Keep the note of a whole snapshot that has no entry yet.
        if note.worker.is_gone and note.name not in files - named:
            backend.delete(PENDING + note.key)
            done.append(f"removed the note of a take that died ({note.name})")
    at_work = {note.about for note in pending if not note.worker.is_gone}
    for one in data:
        name, nonce = name_of(one.key), nonce_of(one.key)
        if nonce and name in named - at_work:
            with contextlib.suppress(DataError):
                form = read_pointer(backend, name)
                if form is not None and form.nonce != nonce:
                    backend.delete(one.key)
                    done.append(f"removed a second whole form ({name})")
    known = {*catalog.entries, *catalog.damaged}
    for snapshot_id, tags in read_tags(backend).items():
        for tag in tags if snapshot_id not in known else ():
            backend.delete(tag_key(snapshot_id, tag))
            done.append(f"removed tag {tag} of {snapshot_id[:8]}, which is not in the store")
    return done


def _forget(backend: Backend, report: CheckReport, needed_by: NeededBy) -> Removal:
    """Remove the snapshots that have lost something, unless a sound one or a VM needs them, and
    data that yields no snapshot."""
    catalog = read_catalog(backend)
    # Damaged entries first: while there is one, nothing else can be removed.
    for snapshot_id in set(report.lost) & set(catalog.damaged):
        damage(catalog.damaged[snapshot_id])
        backend.delete(catalog_key(snapshot_id))
    going = [catalog.entries[one] for one in report.lost if one in catalog.entries]
    removal = remove(backend, going, needed_by, all_or_none=False)
    for finding in report.findings:
        if finding.kind == "orphan":
            delete_data(backend, name_of(finding.key))
    _clear(backend)
    return removal
