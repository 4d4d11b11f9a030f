"""The start of a take: opens the destination and the parent, then a job connects and saves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from msgspec.structs import replace

from stillframe.errors import MachineError, UsageError
from stillframe.machine import Machine
from stillframe.machine.finding import connect
from stillframe.model import Statistics
from stillframe.snapshot.by_migration import (
    human_monitor,
    take_by_migration,
    take_human_into_store,
)
from stillframe.snapshot.into_store import Save, take_into_store
from stillframe.snapshot.job import JobControl, SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.parent import ChangedPages, Parent
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.store.backends.bucket import is_bucket_url
from stillframe.store.keys import Keys
from stillframe.store.locations import Location, open_sink
from stillframe.store.named import as_store, open_named
from stillframe.store.names import check_tag
from stillframe.store.store import Store


class Origins(Protocol):
    """A registry of the VMs that were started from snapshots; see ``restore.take_restored``."""

    def await_resident(self, ref: str | int, step: Callable[[float], None], /) -> None:
        """Wait until all of a VM's RAM is resident; ``step`` gets the share so far, 0 to 1."""

    def own_pages(self, pid: int, snapshot_id: str, /) -> ChangedPages | None:
        """Return the pages that a VM has changed since that snapshot; None if unknown."""

    def origin_of(self, pid: int, /) -> str | None:
        """Return the id of the snapshot that a VM was started from."""

    def is_frozen(self, pid: int, /) -> bool:
        """Return whether a VM's file systems are still frozen from the instant it started from."""


class Keeping(Protocol):
    """A maker of something beside the snapshot; see ``image.keeping``."""

    def finish_take(self, taken: TakenSnapshot, /) -> TakenSnapshot:
        """Finish, once the snapshot has its name; return it, perhaps with more notes. Never
        raises."""

    def close(self) -> None:
        """Remove what was not finished."""


def begin_take(
    vm: str | int | Machine,
    output: Location | Sink | None,
    options: SnapshotOptions,
    *,
    origins: Origins,
    store: Location | Store | None = None,
    tags: Sequence[str] = (),
    full: bool = False,
    parent: Location | Snapshot | None = None,
    keys: Keys | None = None,
    overwrite: bool = False,
    save: Save = take_snapshot,
    keeping: Keeping | None = None,
    on_progress: Callable[[Statistics], None] | None = None,
) -> SnapshotJob:
    """Start a take; the arguments are those of ``api.take``.

    Args:
        options: this function fills in the parent and the snapshot's place.
        save: takes the snapshot. keeping: what ``save`` makes beside it.
    """
    if output is not None and (tags or full):
        raise UsageError("only a store has tags and parents", remedy="leave -o out")
    for tag in tags:
        check_tag(tag)
    key, into = options.key, None
    if output is None:
        into = as_store(store, keys)
        key = into.key_for_new(key)
    needs_qmp = parent is not None or save is not take_snapshot
    cleanup = ExitStack()
    if keeping is not None:
        cleanup.callback(keeping.close)
    opened = parent
    if isinstance(opened, str | os.PathLike):
        opened = cleanup.enter_context(open_named(opened, keys=keys))
    with cleanup:
        if opened is not None and opened.secrets and key is None:
            raise UsageError(
                "the parent is encrypted, and what changed since would not be",
                remedy="encrypt this one, too",
            )
        if output is not None:
            place = os.fspath(output) if isinstance(output, str | os.PathLike) else None
            if place is not None and is_bucket_url(place):
                place = None  # the disks go where --disks-dir says
            disks = replace(options.disks, snapshot=place, encrypted=key is not None)
            options = replace(options, disks=disks)
            sink = open_sink(output, overwrite=overwrite)
            cleanup.callback(sink.abort)  # leaves nothing behind unless it was committed
        cleanup = cleanup.pop_all()

    def work(control: JobControl) -> TakenSnapshot:
        with cleanup:
            if not isinstance(vm, str | int):
                return finished(take(control, vm))
            _await_resident(control, vm, origins)
            control.enter("setup", "connecting")
            try:
                machine = connect(vm)
            except (MachineError, UsageError):
                human = None if needs_qmp else human_monitor(str(vm))
                if human is None:
                    raise
                with human:
                    if into is None:
                        return take_by_migration(control, human, sink, options)
                    return take_human_into_store(control, human, into, options, tags)
            with machine:
                return finished(take(control, machine))

    def take(control: JobControl, machine: Machine) -> TakenSnapshot:
        def since(snapshot: Snapshot) -> Parent:
            return Parent(snapshot, origins.own_pages(machine.pid, snapshot.id))

        _await_resident(control, machine.pid, origins)
        chosen = options if opened is None else replace(options, parent=since(opened))
        if origins.is_frozen(machine.pid):
            chosen = replace(chosen, disks=replace(chosen.disks, frozen=True))
        if into is None:
            return save(control, machine, sink, chosen)
        return take_into_store(
            control, machine, into, chosen, tags=tags,
            since=None if full else since, origin=origins.origin_of(machine.pid), save=save,
        )  # fmt: skip

    def finished(taken: TakenSnapshot) -> TakenSnapshot:
        return taken if keeping is None else keeping.finish_take(taken)

    return SnapshotJob(work, on_progress=on_progress)


def _await_resident(control: JobControl, vm: str | int, origins: Origins) -> None:
    def step(there: float) -> None:
        control.check_cancelled()
        control.progress.phase = f"waiting for the image, {there:.0%} there"
        control.tell()

    origins.await_resident(vm, step)
