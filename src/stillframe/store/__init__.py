"""Snapshot files and stores of them, and the backends that move their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stillframe.errors import StillframeError, UsageError
from stillframe.still.container import Container
from stillframe.still.sealing import Unlock
from stillframe.still.snapshot import Snapshot
from stillframe.store.keys import Keys
from stillframe.store.locations import open_location
from stillframe.store.parents import ParentFiles, whole_form_beside


def open_snapshot(
    path: str | os.PathLike[str],
    keys: Keys | Unlock | None = None,
    *,
    parents: Sequence[str | os.PathLike[str]] = (),
    like: Snapshot | None = None,
) -> Snapshot:
    """Open a snapshot file; open an increment together with its parents.

    Args:
        keys: open an encrypted snapshot.
        parents: files and directories to search for the parents, besides their recorded paths and
            the file's own directory.
        like: the same snapshot, already open; its chain's index is reused.

    Raises:
        NotFoundError: there is no such file, or a parent is missing.
        HostError: not permitted.
        UsageError: not a regular file; or not encrypted, though the keys accept only encrypted
            files.
        DataError: not a snapshot, damaged, or of an unknown version; or not the snapshot that the
            catalog of its encrypted store names.
        LockedError: it is encrypted, and no given key opens it.
    """
    unlock = keys.unlock if isinstance(keys, Keys) else keys
    file = whole_form_beside(Container(open_location(path), unlock), unlock)
    snapshot = Snapshot(file, unlock, resolve=ParentFiles(parents, unlock), like=like)
    if isinstance(keys, Keys):
        try:
            keys.check(os.fspath(path), snapshot.id)
            _check_encrypted(snapshot, keys)
        except StillframeError:
            snapshot.close()
            raise
    return snapshot


def _check_encrypted(snapshot: Snapshot, keys: Keys) -> None:
    plain = next((file for file in snapshot.files if file.secret is None), None)
    if keys.only_encrypted and plain is not None:
        raise UsageError(
            f"{plain.source.description} is not encrypted",
            why="so nobody can tell who wrote it",
            remedy="give no key for it",
        )


def open_file(path: str | os.PathLike[str], keys: Keys | None = None) -> Container:
    """Open a single snapshot file; of an increment, without its parents. Raises the errors of
    :func:`open_snapshot`."""
    return Container(open_location(path), None if keys is None else keys.unlock)
