"""Takes into a store: the file and the disks get their names there, then the catalog its entry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec

from stillframe.errors import BusyError, DataError, NotFoundError, StillframeError, UsageError
from stillframe.machine import Machine
from stillframe.snapshot import faultpoints
from stillframe.snapshot.guest_state import guest_state_of
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.parent import Parent
from stillframe.snapshot.take import take_held, take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.store.catalog import Catalog
from stillframe.store.records import Entry
from stillframe.store.store import Store
from stillframe.store.writing import StoreTarget

Save = Callable[[JobControl, Machine, Sink, SnapshotOptions], TakenSnapshot]
"""As ``take_snapshot``."""
Since = Callable[[Snapshot], Parent]
"""Makes a ``Parent`` of an open snapshot, with the source of what changed since, if any."""


def take_into_store(
    control: JobControl,
    machine: Machine,
    store: Store,
    options: SnapshotOptions,
    *,
    tags: Sequence[str] = (),
    since: Since | None = Parent,
    hold: Hold | None = None,
    origin: str | None = None,
    save: Save = take_snapshot,
) -> TakenSnapshot:
    """As :func:`stillframe.snapshot.take.take_snapshot`, into a store. A failure or a crash leaves
    either no snapshot there or a complete one.

    Args:
        options: if they name a parent, it must be in the store.
        since: if they do not, the parent is the VM's newest snapshot in the store, opened through
            ``since``, unless the chain is too long or its file cannot be read. None: no parent.
        hold: of the machine; its last snapshot, if any, is the parent.
        origin: the id of the snapshot that the VM was restored from: the parent of its first.
        save: takes the snapshot if there is no hold.

    Raises:
        UsageError: the parent is not in the store; or disks are to be copied, and the store is not
            on this host. Otherwise as ``take_snapshot``.
    """
    try:
        return _take(control, machine, store, options, tags, since, hold, origin, save)
    except StillframeError as error:
        error.guest_state = guest_state_of(machine, error.guest_state)
        raise


def _take(
    control: JobControl,
    machine: Machine,
    store: Store,
    options: SnapshotOptions,
    tags: Sequence[str],
    since: Since | None,
    hold: Hold | None,
    origin: str | None,
    save: Save,
) -> TakenSnapshot:
    notes: tuple[str, ...] = ()
    with ExitStack() as stack:
        if hold is not None and hold.last is not None:
            target = stack.enter_context(store.target(_known(store, hold.last.id)))
        elif options.parent is not None:
            target = stack.enter_context(store.target(_known(store, options.parent.snapshot.id)))
        elif since is None or options.for_analysis:
            target = stack.enter_context(store.target())
        else:
            entry = _newest(store, machine.describe().name, origin)
            target, parent, notes = _on_top(stack, store, entry, since)
            options = msgspec.structs.replace(options, parent=parent)
        place = None if target.path is None else os.fspath(target.path)
        disks = msgspec.structs.replace(
            options.disks, snapshot=place, encrypted=store.key is not None
        )
        own = msgspec.structs.replace(options, disks=disks, key=store.key)
        if hold is None:
            taken = save(control, machine, target.sink, own)
        else:
            increment = own.parent is not None or hold.last is not None
            output = SnapshotWriter(target.sink, key=store.key, increment=increment)
            taken = take_held(control, hold, output, own)
        faultpoints.reach("durable")
        try:
            made = target.commit()
        except BaseException:
            if hold is not None:
                hold.forget()
            raise
        faultpoints.reach("entered")
        store.tag(made, tags)
    return msgspec.structs.replace(taken, id=made.id, notes=(*taken.notes, *notes))


def _known(store: Store, parent_id: str) -> Entry:
    entry = store.catalog().entries.get(parent_id)
    if entry is None:
        raise UsageError(
            "the parent is not in the store",
            why=f"its id is {parent_id}",
            remedy="name one of the store's, or none",
            guest_state="running",
        )
    return entry


def _on_top(
    stack: ExitStack, store: Store, entry: Entry | None, since: Since
) -> tuple[StoreTarget, Parent | None, tuple[str, ...]]:
    """Open a target on top of a snapshot; return it, the parent, and notes."""
    if entry is None:
        return stack.enter_context(store.target()), None, ()
    try:
        # The target first: it keeps the parent from being removed.
        target = stack.enter_context(store.target(entry))
        return target, since(stack.enter_context(store.open(entry))), ()
    except BusyError:
        note = f"full: snapshot {entry.short_id} is being removed"
    except (DataError, NotFoundError) as error:
        note = f"full: snapshot {entry.short_id} cannot be read: {error}"
    return stack.enter_context(store.target()), None, (note,)


def _newest(store: Store, vm: str, origin: str | None) -> Entry | None:
    """Find the VM's newest snapshot, else its origin; None if no other may build on that."""
    catalog = store.catalog()
    known = [e for e in catalog.entries.values() if not e.for_analysis]
    of_vm = [e for e in known if vm and e.vm == vm] or [e for e in known if e.id == origin]
    if not of_vm:
        return None
    return of_vm[-1] if _is_short(store, catalog, of_vm[-1]) else None


def _is_short(store: Store, catalog: Catalog, entry: Entry) -> bool:
    """Return whether the entry's chain is complete and short enough for another increment."""
    try:
        return len(catalog.chain(entry)) < store.config.full_every
    except (NotFoundError, DataError):
        return False


def may_go_on_from(store: Store, last: TakenSnapshot | None) -> bool:
    """Return whether the store has this snapshot and another may build on it."""
    catalog = store.catalog()
    entry = None if last is None else catalog.entries.get(last.id)
    return entry is not None and _is_short(store, catalog, entry)
