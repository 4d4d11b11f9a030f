"""Descriptors that QMP clients hand over: named ones (``getfd``) and sets (``add-fd``).

A descriptor arrives with a message's bytes (SCM_RIGHTS) and waits for the command that takes it; if
none does, it is closed when others arrive. Source: QEMU ``monitor/fds.c``, ``qapi/misc.json``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Sequence

import msgspec

from stillframe.errors import NotFoundError
from stillframe.qmp.errors import QmpError

_FDSET_PATH = "/dev/fdset/"
_MOST_DIGITS = 20
_NONE_SUPPLIED = "No file descriptor supplied via SCM_RIGHTS"


class SetMember(msgspec.Struct, frozen=True):
    """A descriptor of a set, with the client's note about it."""

    fd: int
    opaque: str | None


class FdSets:
    """The server's descriptor sets, shared by all clients. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sets: dict[int, list[SetMember]] = {}

    def add(self, fd: int, fdset_id: int | None, opaque: str | None) -> int:
        """Add a descriptor to a set and return the set's id; None picks the lowest unused id.

        Raises:
            QmpError: the id is negative; the caller still owns the descriptor.
        """
        with self._lock:
            if fdset_id is None:
                fdset_id = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
            elif fdset_id < 0:
                raise QmpError("Parameter 'fdset-id' expects a non-negative value")
            self._sets.setdefault(fdset_id, []).insert(0, SetMember(fd, opaque))
            return fdset_id

    def remove(self, fdset_id: int, fd: int | None) -> None:
        """Close one descriptor of a set, or all if ``fd`` is None; duplicates stay open.

        Raises:
            QmpError: there is none.
        """
        with self._lock:
            members = self._sets.get(fdset_id, [])
            gone = [member for member in members if fd in (None, member.fd)]
            if not gone:
                which = f"fdset-id:{fdset_id}" + ("" if fd is None else f", fd:{fd}")
                raise QmpError(f"File descriptor named '{which}' not found")
            members[:] = [member for member in members if member not in gone]
            if not members:
                del self._sets[fdset_id]
        for member in gone:
            os.close(member.fd)

    def listed(self) -> list[tuple[int, list[SetMember]]]:
        """Return all sets, ordered by id."""
        with self._lock:
            return [(fdset_id, list(self._sets[fdset_id])) for fdset_id in sorted(self._sets)]

    def duplicate(self, fdset_id: int, flags: int) -> int:
        """Duplicate the set's descriptor that has the access mode of ``flags`` (open(2)).

        The duplicate shares the original's file offset.

        Raises:
            OSError: ENOENT: no such set. EACCES: no descriptor of it has that access mode.
        """
        with self._lock:
            if fdset_id not in self._sets:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            for member in self._sets[fdset_id]:
                if (fcntl.fcntl(member.fd, fcntl.F_GETFL) ^ flags) & os.O_ACCMODE == 0:
                    return fcntl.fcntl(member.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def clear(self) -> None:
        """Close all descriptors."""
        with self._lock:
            members = [member for one in self._sets.values() for member in one]
            self._sets.clear()
        for member in members:
            os.close(member.fd)


class Descriptors:
    """The descriptors that a command may name. This base class has none."""

    def take(self, name: str) -> int:
        """Return the named descriptor; the caller owns it from here on.

        Raises:
            NotFoundError: there is none.
        """
        raise NotFoundError(f"File descriptor named '{name}' has not been found")

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        """Duplicate the set's descriptor that has the access mode of ``flags``.

        Raises:
            NotFoundError: no such set, or none of its descriptors fits.
        """
        raise NotFoundError(f"fdset {fdset_id} has not been found")


class InheritedDescriptors(Descriptors):
    """The process's inherited descriptors, for a command line: ``fd:N`` names number N.

    Source: QEMU ``monitor/fds.c``: monitor_fd_param.
    """

    def take(self, name: str) -> int:
        """Return the descriptor; the caller owns it from here on.

        Raises:
            NotFoundError: there is none.
        """
        number = _number(name)
        try:
            os.fstat(number)
        except (OSError, OverflowError) as error:
            raise NotFoundError(f"there is no descriptor {name!r}") from error
        os.set_inheritable(number, False)
        return number


class ClientDescriptors(Descriptors):
    """One client's descriptors, and the server's sets. For the client's own thread."""

    def __init__(self, sets: FdSets) -> None:
        self.sets = sets
        self._received: list[int] = []
        self._named: dict[str, int] = {}

    def receive(self, fds: Sequence[int]) -> None:
        """Keep descriptors that came with the last bytes; close earlier ones not taken."""
        if fds:
            self._drop_received()
            self._received = list(fds)

    def take_received(self) -> int:
        """Return the first descriptor last received, which the caller owns; close the others.

        Raises:
            QmpError: there is none.
        """
        if not self._received:
            raise QmpError(_NONE_SUPPLIED)
        fd = self._received.pop(0)
        self._drop_received()
        return fd

    def keep(self, name: str) -> None:
        """Name the received descriptor, and close an earlier one of that name.

        Raises:
            QmpError: none was received, or the name starts with a digit.
        """
        fd = self.take_received()
        if name[:1].isdigit():
            os.close(fd)
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        old = self._named.get(name)
        self._named[name] = fd
        if old is not None:
            os.close(old)

    def close_named(self, name: str) -> None:
        """Close a named descriptor.

        Raises:
            QmpError: there is none.
        """
        fd = self._named.pop(name, None)
        if fd is None:
            raise QmpError(f"File descriptor named '{name}' not found")
        os.close(fd)

    def take(self, name: str) -> int:
        fd = self._named.pop(name, None)
        return super().take(name) if fd is None else fd

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        try:
            return self.sets.duplicate(fdset_id, flags)
        except OSError as error:
            raise NotFoundError(
                f"cannot open {_FDSET_PATH}{fdset_id}", why=error.strerror
            ) from error

    def open_file(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open the file a command names; ``/dev/fdset/N`` names a set.

        Source: QEMU ``util/osdep.c``: qemu_open.

        Raises:
            OSError: the file cannot be opened.
        """
        if path.startswith(_FDSET_PATH):
            number = _number(path.removeprefix(_FDSET_PATH))
            if number < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self.sets.duplicate(number, flags)
        if "\0" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self) -> None:
        """Close the descriptors that a disconnected client left."""
        self._drop_received()
        for fd in self._named.values():
            os.close(fd)
        self._named.clear()

    def _drop_received(self) -> None:
        for fd in self._received:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._received = []


def _number(text: str) -> int:
    """A decimal number; -1 for anything else."""
    fits = len(text) <= _MOST_DIGITS and text.isascii() and text.isdigit()
    return int(text) if fits else -1
