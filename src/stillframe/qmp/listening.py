"""The listening sockets of a QMP server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from stillframe.errors import BusyError, HostError, StillframeError, UsageError
from stillframe.qmp.connection import Address, address_text, socket_name

_BACKLOG = 16
_LOCK_S = 5.0
_RETRY_S = 0.02


class Listener:
    """A listening socket, made by ``listen``. Closing it removes a unix socket's file."""

    def __init__(self, sock: socket.socket, address: Address, made: tuple[int, int] | None) -> None:
        self.socket = sock
        self.address = address
        self._made = made

    def close(self) -> None:
        """Stop listening; never raises."""
        self.socket.close()
        if isinstance(self.address, str):
            with contextlib.suppress(OSError):
                if _identity(self.address) == self._made:
                    Path(self.address).unlink()


def listen(address: Address) -> Listener:
    """Listen on (host, port), or on a unix socket that only our user may connect to.

    Replaces a stale socket file, one on which nothing listens any more. Port 0 takes any free port.

    Raises:
        BusyError: another server listens there.
        UsageError: the path exists and is no socket, or the address is malformed.
        HostError: the system refuses.
    """
    try:
        if isinstance(address, str):
            return _listen_unix(address)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.create_server(address, family=family, backlog=_BACKLOG)
        host, port = sock.getsockname()[:2]
        return Listener(sock, (host, port), None)
    except OSError as error:
        raise _error(address, error) from error
    except (ValueError, OverflowError, TypeError) as error:
        raise UsageError(f"bad monitor address {address!r}", why=str(error)) from error


def _listen_unix(path: str) -> Listener:
    if not path or "\0" in path:
        raise ValueError("no path of a socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file takes the mode of the socket itself (Linux net/unix/af_unix.c: unix_bind_bsd), so
        # at no moment may other users connect.
        os.fchmod(sock.fileno(), 0o600)
        with _directory_lock(Path(path).parent), socket_name(path) as name:
            try:
                sock.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _check_stale(path, name)
                Path(path).unlink()
                sock.bind(name)
            made = _identity(path)
            sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, path, made)


@contextlib.contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Lock the directory: of two servers that start at once, neither may take the other's socket
    for stale before it listens."""
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(_RETRY_S)
        yield
    finally:
        os.close(directory_fd)


def check_free(path: str) -> None:
    """Check that ``listen`` could take a path: nothing is there, or a stale socket file. Removes
    nothing.

    Raises:
        BusyError: another server listens there.
        UsageError: the path exists and is no socket.
        HostError: the path cannot be examined.
    """
    try:
        with socket_name(path) as name:
            _check_stale(path, name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _error(path, error) from error


def _check_stale(path: str, name: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists, and is no socket", remedy="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(name) == errno.ECONNREFUSED
    if not refused:
        raise BusyError(f"somebody listens on {path}", remedy="choose another path")


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _error(address: Address, error: OSError) -> StillframeError:
    where = address_text(address)
    if error.errno == errno.EADDRINUSE:
        return BusyError(f"somebody listens on {where}", remedy="choose another address")
    return HostError(f"cannot listen on {where}", why=error.strerror or str(error))
