"""A snapshot on its way into a store: written under a name, then entered in the catalog.

The order makes it crash-safe at any point (invariant 13): a note that it is being written; the
data, durable under its name; the catalog entry, which makes it a snapshot of the store; removal of
the note.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

from stillframe.errors import (
    BusyError,
    DataError,
    NotFoundError,
    SnapshotFailed,
    StillframeError,
)
from stillframe.still.sinks import Sink
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.records import (
    PENDING,
    REMOVING,
    Entry,
    catalog_key,
    data_key,
    entry_of,
    new_name,
)
from stillframe.store.sealed_backend import open_stored
from stillframe.store.workers import leave_note, read_notes


class StoreTarget:
    """The target of one new snapshot. Write to :attr:`sink` and commit it, then :meth:`commit`
    this; as a context manager, it leaves nothing behind unless that was done.

    Args:
        parent: the snapshot that the new one builds on; it cannot be removed from here on.

    Raises:
        BusyError: the parent is being removed. SinkError: the store cannot be written to.
    """

    def __init__(self, backend: Backend, parent: Entry | None = None) -> None:
        self._backend = backend
        self._parent = parent
        self.name = new_name()
        self._done = False
        # Note first, then check: a removal does the same from its side, so that one sees the other.
        self._note_key = leave_note(
            backend, PENDING, self.name, "" if parent is None else parent.name
        )
        try:
            if parent is not None:
                check_stays(backend, parent)
            self.sink: Sink = backend.sink(data_key(self.name))
        except BaseException:
            self._drop_note()
            raise

    @property
    def path(self) -> Path | None:
        """Path that the file will have, if the store has paths; disks belong in ``PATH.disks``."""
        return self._backend.path(data_key(self.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.abort()

    def commit(self, *, expected_id: str | None = None) -> Entry:
        """Enter the snapshot in the catalog. Its data is durable already.

        Args:
            expected_id: refuse data that is another snapshot's.

        Returns:
            The new entry; the existing one if the store has this snapshot already.

        Raises:
            SinkError: the store cannot be written to. SnapshotFailed: the parent was removed
                meanwhile. DataError: the written data cannot be read, or is another snapshot's.
                Nothing is left behind, unless the snapshot may be in the catalog: then it stays,
                and ``repair`` settles it once this process has ended.
        """
        try:
            with open_stored(self._backend, data_key(self.name)) as file:
                entry = entry_of(file, self.name)
            if expected_id not in (None, entry.id):
                raise DataError(
                    f"the file of snapshot {expected_id} holds another one",
                    why=f"that one is {entry.label}",
                )
            self._check_undisturbed()
        except BaseException:
            self.abort()
            raise
        try:
            found = enter(self._backend, entry)
        except BaseException:
            self._done = not self._is_surely_out(entry)
            self.abort()
            raise
        if found.name != self.name:  # the same snapshot is there
            self.abort()
            return found
        self._done = True
        self._drop_note()
        return entry

    def abort(self) -> None:
        """Leave nothing behind, unless the snapshot was, or may have been, committed. Never
        raises."""
        if self._done:
            return
        self._done = True
        self.sink.abort()
        # The note goes last: if we fail, it tells whose the rest is.
        with contextlib.suppress(StillframeError):
            delete_data(self._backend, self.name)
            self._drop_note()

    def _is_surely_out(self, entry: Entry) -> bool:
        """Return whether an entry whose creation failed is certainly not in the catalog. In a
        directory, a look decides that; in a bucket, an abandoned request may still be in flight."""
        if self.path is None:
            return False
        try:
            small_objects.read(self._backend, catalog_key(entry.id), Entry)
        except NotFoundError:
            return True
        except StillframeError:
            pass
        return False

    def _check_undisturbed(self) -> None:
        """Raise SnapshotFailed if another process took this one for dead, after a day, and cleared
        its note or removed the parent."""
        try:
            self._backend.read(self._note_key)
            if self._parent is not None:
                check_stays(self._backend, self._parent)
        except (NotFoundError, BusyError) as error:
            raise SnapshotFailed(
                "the snapshot took so long that it was given up for dead, and cleared away",
                remedy="take another one",
                guest_state="running",
            ) from error

    def _drop_note(self) -> None:
        with contextlib.suppress(StillframeError):
            self._backend.delete(self._note_key)


def enter(backend: Backend, entry: Entry) -> Entry:
    """Put an entry in the catalog; idempotent, also after an error.

    Returns:
        The entry that is there now: this one, or that of the same snapshot under another name.

    Raises:
        SinkError: it cannot be written, and is not there.
    """
    key = catalog_key(entry.id)
    try:
        if backend.create(key, small_objects.encoded(entry)):
            return entry
    except StillframeError:
        # The write may have succeeded, and only its reply was lost.
        with contextlib.suppress(StillframeError):
            found = small_objects.read(backend, key, Entry)
            if found.name == entry.name:
                return found
        raise
    return small_objects.read(backend, key, Entry)


def check_stays(backend: Backend, entry: Entry) -> None:
    """Raise BusyError if a snapshot is being removed, or is gone.

    A caller that relies on the answer must first leave a note that names the snapshot.
    """
    # Notes before entry: a complete removal has removed its note, and the entry before that.
    notes = read_notes(backend, f"{REMOVING}{entry.name}.")
    found: Entry | None = None
    with contextlib.suppress(NotFoundError):
        found = small_objects.read(backend, catalog_key(entry.id), Entry)
    stands = found is not None and found.name == entry.name
    if not stands or any(not note.worker.is_gone for note in notes):
        raise BusyError(f"snapshot {entry.label} is being removed")


def delete_data(backend: Backend, name: str) -> None:
    """Remove a snapshot's file and all objects that belong to it.

    Raises:
        SinkError: not permitted.
    """
    for one in backend.listing(data_key(name)):  # the file is the first of them
        backend.delete(one.key)
