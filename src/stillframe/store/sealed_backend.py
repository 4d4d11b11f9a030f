"""The backend of an encrypted store: seals catalog entries, and hides tags in their object names.

Ids, sizes and times, the configuration and the notes of working processes (with the host's boot id)
stay readable. The snapshots' data is encrypted by itself, and each key is wrapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from stillframe.errors import DataError, LockedError, NotFoundError
from stillframe.still.container import Container
from stillframe.still.sealing import (
    DataKey,
    Unlock,
    hidden_name,
    open_object,
    seal_object,
    unlock_with,
)
from stillframe.still.sinks import Sink, Source
from stillframe.store.backends.objects import Backend, StoredObject
from stillframe.store.records import CATALOG, TAGS

_ID_DIGITS: Final = 64


class SealedBackend:
    """A ``Backend`` over another one. Sealed objects are bound to their keys, so none can stand in
    for another.

    Args:
        key: the store's data key.
    """

    def __init__(self, backend: Backend, key: DataKey) -> None:
        self._backend = backend
        self.key = key
        self._secret = key.secret
        self._tags: dict[str, str] = {}
        self.unlock = unlock_with({key.id: key.secret})

    @property
    def description(self) -> str:
        return self._backend.description

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith(TAGS):
            place = self._place(key)
            return self._backend.create(place, seal_object(self._secret, place, key.encode()))
        if key.startswith(CATALOG):
            data = seal_object(self._secret, key, data)
        return self._backend.create(key, data)

    def read(self, key: str) -> bytes:
        data = self._backend.read(self._place(key))
        if key.startswith(TAGS):
            return b""
        return open_object(self._secret, key, data) if key.startswith(CATALOG) else data

    def open(self, key: str) -> Source:
        return self._backend.open(key)

    def listing(self, prefix: str) -> list[StoredObject]:
        tags = prefix.startswith(TAGS) or TAGS.startswith(prefix)
        found = self._backend.listing(TAGS if tags and prefix.startswith(TAGS) else prefix)
        if not tags:
            return found
        named = (one._replace(key=self._name(one.key)) for one in found)
        return sorted(one for one in named if one.key.startswith(prefix))

    def delete(self, key: str) -> None:
        self._backend.delete(self._place(key))

    def sink(self, key: str) -> Sink:
        return self._backend.sink(key)

    def path(self, key: str) -> Path | None:
        return self._backend.path(key)

    def _place(self, key: str) -> str:
        """Return where an object is stored; a tag's place does not reveal the tag."""
        head, dash, _ = key.partition("-")
        if not key.startswith(TAGS) or not dash or len(head) != len(TAGS) + _ID_DIGITS:
            return key
        return f"{head}-{hidden_name(self._secret, key)}"

    def _name(self, place: str) -> str:
        """Return a tag's key by its place; the place itself if it holds no tag of ours."""
        if place.startswith(TAGS) and place not in self._tags:
            try:
                name = open_object(self._secret, place, self._backend.read(place)).decode()
            except (DataError, NotFoundError, UnicodeDecodeError):
                return place
            self._tags[place] = name
        return self._tags.get(place, place)


def unlock_of(backend: Backend) -> Unlock | None:
    """Return what opens a store's snapshots; None if it is not encrypted."""
    return backend.unlock if isinstance(backend, SealedBackend) else None


def open_stored(backend: Backend, key: str) -> Container:
    """Open a single snapshot file of a store.

    Raises:
        NotFoundError: there is none. HostError: not permitted.
        DataError: damaged; or it is not encrypted, but the store is.
    """
    if not isinstance(backend, SealedBackend):
        return Container(backend.open(key))
    try:
        file = Container(backend.open(key), backend.unlock)
    except LockedError as error:
        raise DataError(f"the seal of {key} is not authentic", why=str(error)) from error
    if file.secret is None:
        file.close()
        raise DataError(f"{key} is not encrypted", why="and the store is: somebody put it there")
    return file
