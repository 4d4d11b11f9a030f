"""Snapshots in files, and what moves their bytes."""

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
    """Open a snapshot file; an increment with its parents.

    Args:
        parents: where these are, besides where they were and beside the file: files, directories.
        keys: for an encrypted one.
        like: the same snapshot, open already.

    Raises:
        NotFoundError: no such file, or a parent is missing.
        HostError: not permitted.
        UsageError: not a regular file; not encrypted, though the keys are for such only.
        DataError: not a snapshot, damaged, or of a version that we do not know; or another one than
            the catalog of its encrypted store says.
        LockedError: it is encrypted, and nothing that was given opens it.
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
    """Open one snapshot file for itself: an increment without its parents. Errors as
    :func:`open_snapshot`."""
    return Container(open_location(path), None if keys is None else keys.unlock)
