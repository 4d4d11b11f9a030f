"""Whole forms: beside an increment's file, the same snapshot as one file that needs no parent.

The increment stays, with its id, its names and its disks. Beside it, a writer first puts the whole
form's data, under a key of its own, and then a small object, the pointer, that says which data
counts. The pointer is created only once, so several writers agree on one form. A reader finds the
pointer, or else the increment and its parents: these go only once the pointer exists.
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
    """The pointer's record. ``id``: the increment's id. ``nonce``: the nonce in the data's key."""

    format: Literal[1] = 1
    id: str
    nonce: str


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot's whole form as a listing shows it. ``since_s``: when it was entered, by the
    backend's wall clock; None if it is not. ``bytes``: size of all its objects."""

    since_s: float | None
    bytes: int


def pointer_key(place: str) -> str:
    """Return the pointer's location; ``place`` is the increment's key, path or URL."""
    return place + _WHOLE


def whole_key(place: str, nonce: str) -> str:
    """Return the location of the whole form's data."""
    return f"{place}{_WHOLE}-{nonce}"


def new_nonce() -> str:
    return secrets.token_hex(8)


def nonce_of(key: str) -> str:
    """Return the nonce of the whole form whose data an object is; empty if it is no such data."""
    nonce = key.removeprefix(whole_key(data_key(name_of(key)), ""))
    return nonce if _NONCE.fullmatch(nonce) else ""


def decoded(raw: bytes, key: str) -> WholeForm:
    """Decode the pointer.

    Raises:
        DataError: damaged.
    """
    form = small_objects.decoded(raw, key, WholeForm)
    if _NONCE.fullmatch(form.nonce) is None:
        raise DataError(f"{key} is damaged", why="it names no object")
    return form


def read_pointer(backend: Backend, name: str) -> WholeForm | None:
    """Return the snapshot's whole form that counts; None if it has none.

    Raises:
        DataError: the pointer is damaged.
    """
    key = pointer_key(data_key(name))
    try:
        return decoded(backend.read(key), key)
    except NotFoundError:
        return None


def enter_form(backend: Backend, name: str, form: WholeForm) -> WholeForm:
    """Make a whole form the one that counts, unless there is one; return the one that counts.

    Raises:
        SinkError: the pointer cannot be written, and none exists.
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
    """Return the whole forms in a listing of ``snapshots/``, by the snapshots' names."""
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
    """Open a snapshot for reading: its whole form if it has one, else its file.

    Raises:
        NotFoundError: there is none. DataError: damaged. Otherwise as ``open_stored``.
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
    """Return the whole form of an opened file, and close the file; return the file if it has none.

    Args:
        pointer: returns the whole form that counts. data: opens its data; NotFoundError: it was
            removed meanwhile.

    Raises:
        DataError: the whole form is damaged, or another snapshot's; the file is closed.
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
