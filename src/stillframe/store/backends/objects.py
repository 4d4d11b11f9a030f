"""What a store needs of the place that holds it: few operations, which object stores have, too.

An object is written once and never changed. Its name appears when all of it is there and durable,
and two writers of one name do not both succeed: a store is built on nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from stillframe.still.sinks import Sink, Source


class StoredObject(NamedTuple):
    """``key``: its name. ``modified_s``: when it was written, by the wall clock of the place."""

    key: str
    bytes: int
    modified_s: float


@runtime_checkable
class Backend(Protocol):
    """A flat name space of immutable objects. Safe to use from several threads and processes.

    A key is made of letters, digits and ``-_.@+``, in parts separated by ``/``; no part begins with
    a dot. What was written is seen by everybody at once (strong consistency).
    """

    @property
    def description(self) -> str:
        """What messages call the place: a path or a URL."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object, durable when this returns, unless one of that name is there.

        Returns:
            Whether it was written. After an error it may be there or not: look.

        Raises:
            SinkError: full, not permitted.
        """

    def read(self, key: str) -> bytes:
        """All of a small object.

        Raises:
            NotFoundError: there is none. HostError: not permitted. DataError: it cannot be read.
        """

    def open(self, key: str) -> Source:
        """An object for reading at any place.

        Raises:
            NotFoundError: there is none. HostError: not permitted.
        """

    def listing(self, prefix: str) -> list[StoredObject]:
        """The objects whose keys begin with ``prefix``, sorted by key.

        Raises:
            HostError: not permitted, or the place is gone.
        """

    def delete(self, key: str) -> None:
        """Remove an object for good; it need not be there.

        Raises:
            SinkError: not permitted.
        """

    def sink(self, key: str) -> Sink:
        """For writing a large object, piece by piece; its name appears at ``commit``, and a name
        that is taken is an error there at the latest.

        Raises:
            SinkError: full, not permitted.
        """

    def path(self, key: str) -> Path | None:
        """Where the object is, or would be, as a file of this host; None if it is no file."""
