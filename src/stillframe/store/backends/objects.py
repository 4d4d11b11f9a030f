"""The operations that a store needs of its place: few enough that object stores offer them, too.

An object is written once and never changes. Its name appears when its content is complete and
durable, and of two writers of one name only one succeeds. A store relies on nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from stillframe.still.sinks import Sink, Source


class StoredObject(NamedTuple):
    """An object in a listing. ``key``: its name. ``modified_s``: when it was written, by the wall
    clock of the backend."""

    key: str
    bytes: int
    modified_s: float


@runtime_checkable
class Backend(Protocol):
    """A flat name space of immutable objects. Safe to use from several threads and processes.

    A key consists of letters, digits and ``-_.@+``, in parts separated by ``/``; no part begins
    with a dot. Every reader sees a write at once (strong consistency).
    """

    @property
    def description(self) -> str:
        """The place's name in messages: a path or a URL."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless its name is taken; it is durable on return.

        Returns:
            Whether it was written. After an error the object may exist or not: look.

        Raises:
            SinkError: full, not permitted.
        """

    def read(self, key: str) -> bytes:
        """Return the whole content of a small object.

        Raises:
            NotFoundError: there is no such object. HostError: not permitted. DataError: it cannot
                be read.
        """

    def open(self, key: str) -> Source:
        """Open an object for random access.

        Raises:
            NotFoundError: there is no such object. HostError: not permitted.
        """

    def listing(self, prefix: str) -> list[StoredObject]:
        """List the objects whose keys begin with ``prefix``, sorted by key.

        Raises:
            HostError: not permitted, or the place is gone.
        """

    def delete(self, key: str) -> None:
        """Remove an object for good; do nothing if there is none.

        Raises:
            SinkError: not permitted.
        """

    def sink(self, key: str) -> Sink:
        """Return a sink for a large object. Its name appears at ``commit``, which at the latest
        fails if the name is taken.

        Raises:
            SinkError: full, not permitted.
        """

    def path(self, key: str) -> Path | None:
        """Return the object's path, present or future, on this host; None if it is not a file."""
