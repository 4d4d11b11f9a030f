"""Whole forms: beside an increment's file, the same snapshot as one file that needs no parent.

The increment stays where it is, and its id, its names and its disks with it. Beside it are first
the whole form's data, under a key of its own for each who writes one; then a small object that says
which of them counts. That is made once, so several writers end with one, and whoever reads finds
it, or the increment and its parents: these go only when it is there.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable
from typing import Literal

import msgspec

from stillframe.errors import DataError, NotFoundError, StillframeError
from stillframe.still.container import Container
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend, StoredObject
from stillframe.store.records import data_key, name_of
from stillframe.store.sealed_backend import open_stored

_WHOLE = ".whole"
_NONCE = re.compile(r"[0-9a-f]{16}")


class WholeForm(msgspec.Struct, frozen=True, kw_only=True):
    """``id``: of the snapshot, the increment's. ``nonce``: of the data's key."""

    format: Literal[1] = 1
    id: str
    nonce: str


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """What a listing tells of a snapshot's whole form. ``since_s``: when it was entered, by the
    wall clock of the place; None if it is not. ``bytes``: of all its objects."""

    since_s: float | None
    bytes: int


def pointer_key(place: str) -> str:
    """Of the small object; ``place`` is the increment's key, path or URL."""
    return place + _WHOLE


def whole_key(place: str, nonce: str) -> str:
    """Of the data."""
    return f"{place}{_WHOLE}-{nonce}"


def new_nonce() -> str:
    return secrets.token_hex(8)


def nonce_of(key: str) -> str:
    """Which whole form's data an object is; empty if none's."""
    nonce = key.removeprefix(whole_key(data_key(name_of(key)), ""))
    return nonce if _NONCE.fullmatch(nonce) else ""


def decoded(raw: bytes, key: str) -> WholeForm:
    """What the small object says.

    Raises:
        DataError: damaged.
    """
    form = small_objects.decoded(raw, key, WholeForm)
    if _NONCE.fullmatch(form.nonce) is None:
        raise DataError(f"{key} is damaged", why="it names no object")
    return form


def read_pointer(backend: Backend, name: str) -> WholeForm | None:
    """Which whole form of a snapshot counts; None if it has none.

    Raises:
        DataError: that object is damaged.
    """
    key = pointer_key(data_key(name))
    try:
        return decoded(backend.read(key), key)
    except NotFoundError:
        return None


def enter_form(backend: Backend, name: str, form: WholeForm) -> WholeForm:
    """Make a whole form the one that counts; the one that does.

    Raises:
        SinkError: it cannot be written, and none is there.
    """
    try:
        if backend.create(pointer_key(data_key(name)), small_objects.encoded(form)):
            return form
    except StillframeError:
        with contextlib.suppress(StillframeError):
            if (found := read_pointer(backend, name)) is not None:
                return found
        raise
    found = read_pointer(backend, name)
    return form if found is None else found


def listed(objects: list[StoredObject]) -> dict[str, Beside]:
    """The whole forms in a listing of ``snapshots/``, by the snapshots' names."""
    found: dict[str, Beside] = {}
    for one in objects:
        name = name_of(one.key)
        is_pointer = one.key == pointer_key(data_key(name))
        if name and (is_pointer or nonce_of(one.key)):
            before = found.get(name, Beside(since_s=None, bytes=0))
            found[name] = Beside(
                since_s=one.modified_s if is_pointer else before.since_s,
                bytes=before.bytes + one.bytes,
            )
    return found


def open_form(backend: Backend, name: str) -> Container:
    """Open a snapshot's file for reading: its whole form, if it has one.

    Raises:
        NotFoundError: there is none. DataError: damaged. Else as ``open_stored``.
    """
    return read_whole(
        open_stored(backend, data_key(name)),
        lambda: read_pointer(backend, name),
        lambda nonce: open_stored(backend, whole_key(data_key(name), nonce)),
    )


def read_whole(
    file: Container,
    pointer: Callable[[], WholeForm | None],
    data: Callable[[str], Container],
) -> Container:
    """The whole form of an opened file, which is closed then; the file itself if it has none.

    Args:
        pointer: finds which one counts. data: opens it; NotFoundError: it was removed meanwhile.

    Raises:
        DataError: it is damaged, or another snapshot's; the file is closed.
    """
    if file.manifest.parent is None:
        return file
    try:
        form = pointer()
        whole = None if form is None else data(form.nonce)
    except NotFoundError:
        return file
    except BaseException:
        file.close()
        raise
    if whole is None:
        return file
    file.close()
    try:
        whole.stand_in_for(file)
    except DataError:
        whole.close()
        raise
    return whole
