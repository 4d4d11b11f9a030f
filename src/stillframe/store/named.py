"""Finds what a caller names: a store, and a snapshot by its path or by its name in a store."""

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
    """The store itself, or the one that a location names; errors as :func:`open_store`."""
    if store is None or isinstance(store, str | os.PathLike):
        return open_store(store, keys=keys)
    return store


def locate(
    path: Location, *, store: Location | Store | None = None, keys: Keys | None = None
) -> Location:
    """The file that a path or a name in a store means. A file that is there wins.

    Args:
        path: a file; or an id, the beginning of one (4 digits and more), ``VM@latest``,
            ``VM@TIME`` (the newest until then) or ``VM@TAG``.

    Raises:
        NotFoundError: it can be no file, and no store has it. UsageError: it could be several.
        DataError: the store has another snapshot there than its catalog says.
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

    An increment is opened with its parents, and reads as a whole snapshot does.

    Args:
        path: a file; else a name in the store, as for :func:`locate`. So in all other functions.
        keys: for an encrypted one, and encrypted parents.
        parents: where these are, besides where they were and beside the file: files, directories.

    Raises:
        NotFoundError: no such file or snapshot, or a parent is missing.
        UsageError: not a regular file. HostError: not permitted.
        DataError: not a snapshot, damaged, or of a version that we do not know.
        LockedError: it is encrypted, and no key that was given opens it.
    """
    return open_snapshot(locate(path, keys=keys), keys, parents=parents)
