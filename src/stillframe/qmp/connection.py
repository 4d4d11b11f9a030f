"""The socket of a QMP connection: opened, or refused with a clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from stillframe.errors import (
    BusyError,
    HostError,
    MachineError,
    NotFoundError,
    StillframeError,
    UsageError,
    host_error,
)

Address = str | tuple[str, int]
"""A unix socket's path, or (host, port)."""

_SUN_PATH_BYTES = 107
"""Longest path that fits a ``sockaddr_un`` (unix(7))."""

_RETRY_S = 0.02

_ONE_CLIENT = "a QMP monitor serves one client at a time"
_OTHER_MONITOR = "give the VM a second -qmp socket, or stop the other client (libvirt, a QMP shell)"
QMP_OPTION = "-qmp unix:PATH,server=on,wait=off"
HUMAN_REMEDY = (
    "say 'migrate \"exec:cat >/PATH/FILE\"' and then 'cont' in its human monitor, and"
    " 'stillframe import /PATH/FILE -o SNAPSHOT'"
)
"""The human monitor cannot save device state (``xen-save-devices-state`` is QMP's), but it can
migrate; the guest stays paused from the migration's end until ``cont``."""


def address_text(address: Address) -> str:
    """Return the address as text."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_socket(address: Address, timeout_s: float) -> socket.socket:
    """Connect a stream socket to a monitor.

    Raises:
        NotFoundError, BusyError, HostError, MachineError, UsageError: depending on the reason.
    """
    if "\0" in address if isinstance(address, str) else not 0 < address[1] < 65536:
        raise UsageError(f"bad monitor address {address!r}")
    try:
        if isinstance(address, str):
            return _open_unix(address, timeout_s)
        sock = socket.create_connection(address, timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise _connect_error(address, error) from error
    except (ValueError, OverflowError) as error:
        raise UsageError(f"bad monitor address {address!r}", why=str(error)) from error
    return sock


def _open_unix(path: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        with socket_name(path) as name:
            _connect_unix(sock, name, timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def socket_name(path: str) -> Iterator[str]:
    """Yield a name for a unix socket's path that fits a ``sockaddr_un``, valid inside the ``with``.

    Raises:
        OSError: there is no such directory.
    """
    if len(os.fsencode(path)) <= _SUN_PATH_BYTES:
        yield path
        return
    # Too long: go through a descriptor of its directory.
    directory, name = os.path.split(path)
    directory_fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory_fd}/{name}"
    finally:
        os.close(directory_fd)


def _connect_unix(sock: socket.socket, path: str, timeout_s: float) -> None:
    """Connect, and wait while other clients fill the listener's short queue."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_RETRY_S)


def _connect_error(address: Address, error: OSError) -> StillframeError:
    where = address_text(address)
    if isinstance(error, socket.gaierror):
        return NotFoundError(f"no host of that name: {where}", why=error.strerror)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(f"no QMP socket {where}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return HostError(
            f"may not connect to {where}", why="permission denied", remedy="run as the VM's user"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return host_error(f"cannot connect to {where}", error)
    if error.errno == errno.EAGAIN:
        return BusyError(f"the monitor {where} is busy", why=_ONE_CLIENT, remedy=_OTHER_MONITOR)
    if error.errno == errno.ECONNREFUSED and not _may_be_socket(address):
        return UsageError(f"{where} is no socket", remedy="name the VM's -qmp socket")
    if error.errno == errno.ECONNREFUSED:
        return MachineError(
            f"nobody listens on {where}",
            remedy="the VM has exited, or the address is not a monitor's",
        )
    if error.errno in (errno.ENOTSOCK, errno.EPROTOTYPE):
        return UsageError(f"{where} is not a stream socket", remedy="name the VM's -qmp socket")
    return MachineError(f"cannot connect to {where}", why=error.strerror or str(error))


def _may_be_socket(address: Address) -> bool:
    """Return whether it may be a socket: connect(2) refuses another kind of file and a socket
    without a listener alike."""
    try:
        return not isinstance(address, str) or stat.S_ISSOCK(Path(address).stat().st_mode)
    except OSError:
        return True


def greeting_error(
    address: Address, cause: OSError | EOFError, timeout_s: float, *, greeted: bool
) -> StillframeError:
    """Return the error for a monitor that did not complete the negotiation, with the likeliest
    cause."""
    where = address_text(address)
    if isinstance(cause, TimeoutError):
        if greeted:
            return MachineError(
                f"the monitor {where} greeted, but did not answer within {timeout_s:g} s",
                remedy="the VM's main loop may be stuck; check whether the VM still runs",
            )
        if has_client(address):
            return BusyError(
                f"the monitor {where} is in use by another client",
                why=_ONE_CLIENT,
                remedy=_OTHER_MONITOR,
            )
        return BusyError(
            f"the monitor {where} did not greet within {timeout_s:g} s",
            why=f"another client may hold it ({_ONE_CLIENT}), or the VM's main loop is stuck",
            remedy=_OTHER_MONITOR,
        )
    return MachineError(f"the monitor {where} hung up", remedy="check whether the VM still runs")


def no_qmp_error(address: Address) -> MachineError:
    """Return the error for a listener that is no QMP server."""
    return MachineError(
        f"{address_text(address)} does not speak QMP",
        remedy=f"name a -qmp (or -mon mode=control) socket; a VM without one: {HUMAN_REMEDY}",
    )


def has_client(address: Address) -> bool:
    """Return whether a unix socket has an accepted connection now (/proc/net/unix, state 03)."""
    if not isinstance(address, str):
        return False
    names = {address}
    with contextlib.suppress(OSError):
        names.add(str(Path(address).resolve()))
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return False
    for line in lines:
        parts = line.split(None, 7)
        if len(parts) == 8 and parts[5] == "03" and parts[7] in names:
            return True
    return False
