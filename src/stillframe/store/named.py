"""Resolution of what a caller names: a store, and a snapshot by path or by its name in a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing

from stillframe.still.snapshot import Snapshot
from stillframe.still.trailer import read_trailer
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys, not_the_catalogs
from stillframe.store.locations import Location, open_location
from stillframe.store.names import is_name
from stillframe.store.opening import open_store
from stillframe.store.store import Store


def as_store(store: Location | Store | None, keys: Keys | None = None) -> Store:
    """Return the store itself, or open the one at a location; raises as :func:`open_store`."""
    if store is None or isinstance(store, str | os.PathLike):
        return open_store(store, keys=keys)
    return store


def locate(
    path: Location, *, store: Location | Store | None = None, keys: Keys | None = None
) -> Location:
    """Return the file that a path, or a name in a store, refers to. An existing file wins.

    Args:
        path: a file; or an id, its first digits (at least 4), ``VM@latest``, ``VM@TIME`` (the
            newest up to then) or ``VM@TAG``.

    Raises:
        NotFoundError: it cannot be a file, and the store does not have it. UsageError: ambiguous.
        DataError: the file in the store is not the snapshot that its catalog names.
    """
    text = os.fspath(path)
    if os.path.lexists(text) or not is_name(text):
        return path
    found = as_store(store, keys)
    entry = found.find(text)
    location = found.location(entry)
    with closing(open_location(location)) as file:
        if read_trailer(file)[0].snapshot_id != entry.id:
            raise not_the_catalogs(location)
    if keys is not None:
        keys.expect(location, entry.id)
    return location


def open_named(
    path: Location, *, keys: Keys | None = None, parents: Sequence[Location] = ()
) -> Snapshot:
    """Open a snapshot: manifest, index, any page, the stream. Use it as a context manager.

    An increment is opened with its parents and reads like a full snapshot.

    Args:
        path: a file, or a name in the store, as for :func:`locate`. The same holds for all other
            functions.
        keys: open an encrypted snapshot, and encrypted parents.
        parents: files and directories to search for the parents, besides their recorded paths and
            the file's own directory.

    Raises:
        NotFoundError: no such file or snapshot, or a parent is missing.
        UsageError: not a regular file. HostError: not permitted.
        DataError: not a snapshot, damaged, or of an unknown version.
        LockedError: it is encrypted, and no given key opens it.
    """
    return open_snapshot(locate(path, keys=keys), keys, parents=parents)
