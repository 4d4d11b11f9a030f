"""Compaction: keeps chains short by whole forms for increments (:mod:`stillframe.store.wholes`).

It changes nothing that a reader uses. A process that dies leaves a note, and either data that no
small object names or a whole form that is complete and counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from stillframe.errors import (
    DataError,
    NotFoundError,
    SnapshotCancelled,
    SnapshotFailed,
    StillframeError,
)
from stillframe.still.compact import compact
from stillframe.still.sinks import aborting
from stillframe.store.catalog import Catalog
from stillframe.store.records import PENDING, Entry, data_key, new_name
from stillframe.store.sealed_backend import open_stored
from stillframe.store.wholes import WholeForm, enter_form, new_nonce, read_pointer, whole_key
from stillframe.store.workers import leave_note
from stillframe.store.writing import check_stays

if TYPE_CHECKING:
    from stillframe.store.store import Store

MOST_FILES = 16
"""The longest chain that compaction leaves: how many files a restore reads at most."""


def nobody_stops() -> bool:
    """Default for ``stopped``: never stop."""
    return False


def chosen(
    catalog: Catalog, going: Collection[Entry] = (), vms: Collection[str] = ()
) -> tuple[Entry, ...]:
    """Choose the snapshots that need a whole form, so that no remaining snapshot has a chain longer
    than ``MOST_FILES``; parents come before children.

    Normally that is one snapshot in ``MOST_FILES``. Where the policy drops parents, the snapshot
    above them gets the whole form instead, so that they can be removed; at worst, twice as many
    snapshots get one.

    Args:
        going: the snapshots that the policy does not keep.
        vms: only these VMs' chains; all if empty.
    """
    planned: dict[str, Entry] = {}
    gone = {entry.id for entry in going}
    for entry in catalog.entries.values():
        if entry.id in gone or (vms and entry.vm not in vms):
            continue
        with contextlib.suppress(NotFoundError, DataError):  # ``check`` reports these
            chain = _files(catalog, entry, planned)
            if len(chain) > MOST_FILES:
                one = _best(chain, gone)
                planned[one.id] = one
    return tuple(planned.values())


def _files(catalog: Catalog, entry: Entry, planned: Collection[str]) -> list[Entry]:
    """Return the files that the entry will need once the planned whole forms exist, newest
    first."""
    chain = catalog.chain(entry)
    ends = (number for number, one in enumerate(chain, 1) if one.id in planned)
    return chain[: next(ends, len(chain))]


def _best(chain: list[Entry], gone: Collection[str]) -> Entry:
    """Return the snapshot whose whole form lets the most parents go; else the newest."""
    going = [0] * (len(chain) + 1)  # length of the run of dropped snapshots from this one on
    for number in range(len(chain) - 1, -1, -1):
        going[number] = going[number + 1] + 1 if chain[number].id in gone else 0
    near = range(MOST_FILES // 2)
    return chain[max(near, key=lambda number: going[number + 1] * (going[number] == 0))]


def give_whole_form(
    store: Store, entry: Entry, stopped: Callable[[], bool] = nobody_stops
) -> int | None:
    """Write a snapshot's whole form and enter it. From then on its parents may be removed.

    Args:
        stopped: polled during the work; True ends it.

    Returns:
        Bytes written; None if the snapshot has a whole form, also if another process was first.

    Raises:
        BusyError: the snapshot is being removed. NotFoundError, DataError: it cannot be read.
        SnapshotCancelled: ``stopped`` returned True. SinkError: full, not permitted. Nothing is
            left behind, unless the whole form may have been entered.
    """
    backend = store.backend
    note = leave_note(backend, PENDING, new_name(), entry.name)
    try:
        check_stays(backend, entry)
        if read_pointer(backend, entry.name) is not None:
            return None
        nonce = new_nonce()
        key = whole_key(data_key(entry.name), nonce)
        try:
            written = _write(store, entry, key, stopped)
            backend.read(note)  # gone if we were taken for dead, after a day
            check_stays(backend, entry)
        except NotFoundError as error:
            backend.delete(key)
            raise SnapshotFailed(
                f"snapshot {entry.label} was removed while it was compacted", guest_state="none"
            ) from error
        except BaseException:
            backend.delete(key)
            raise
        form = WholeForm(id=entry.id, nonce=nonce)
        try:
            counts = enter_form(backend, entry.name, form) == form
        except BaseException:
            # In a bucket, the request may still be in flight: keep the data, 'repair' enters it.
            if backend.path(key) is not None and read_pointer(backend, entry.name) is None:
                backend.delete(key)
            raise
        if counts:
            return written
        backend.delete(key)
        return None
    finally:
        with contextlib.suppress(StillframeError):
            backend.delete(note)


def _write(store: Store, entry: Entry, key: str, stopped: Callable[[], bool]) -> int:
    def step() -> None:
        if stopped():
            raise SnapshotCancelled("compaction was stopped", guest_state="none")

    with store.open(entry) as snapshot:
        sink = store.backend.sink(key)
        with aborting(sink):
            compact(snapshot, sink, key=store.key, whole_of=entry.id, step=step)
    with open_stored(store.backend, key) as file:
        return file.source.size_bytes
