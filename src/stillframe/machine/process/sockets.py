"""The process behind a socket, and the socket behind a descriptor (proc(5), unix(7))."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_UNIX_LISTENS = 0x10000
_TCP_LISTENS = "0A"


def peer_pid(sock: socket.socket) -> int | None:
    """Return the process that listened on the other end of a connected unix socket, or None."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    pid: int = struct.unpack("3i", raw)[0]
    return pid if pid > 0 else None


def unix_socket_path(process: Path, fd: int) -> str | None:
    """Return the path that a process's socket descriptor is bound to, or None (``process``:
    /proc/PID)."""
    try:
        inode = _socket_inode(str((process / "fd" / str(fd)).readlink()))
        table = (process / "net/unix").read_text(errors="surrogateescape")
    except OSError:
        return None
    for entry_inode, _listens, path in _unix_entries(table):
        if entry_inode == inode and path.startswith("/"):
            return path
    return None


def unix_listener_pids(path: str) -> list[int]:
    """Return the processes that hold a socket listening at ``path``, as far as we can see."""
    try:
        table = Path("/proc/net/unix").read_text(errors="surrogateescape")
    except OSError:
        return []
    return _owners_of({i for i, listens, name in _unix_entries(table) if listens and name == path})


def listening_unix_paths(*names: str) -> list[str]:
    """Return the paths of listening sockets that end with one of ``names``."""
    try:
        table = Path("/proc/net/unix").read_text(errors="surrogateescape")
    except OSError:
        return []
    found = [path for _, listens, path in _unix_entries(table) if listens and path.endswith(names)]
    return [path for path in found if path.startswith("/")]


def tcp_listener_pid(port: int) -> int | None:
    """Return the process that holds the TCP socket listening on a local port, or None."""
    inodes: set[int] = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                local_port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == _TCP_LISTENS and local_port == port:
                    inodes.add(int(fields[9]))
    return next(iter(_owners_of(inodes)), None)


def _unix_entries(table: str) -> Iterator[tuple[int, bool, str]]:
    """Yield (inode, whether it listens, path) for each entry of ``/proc/net/unix``."""
    for line in table.splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8:
            yield int(fields[6]), bool(int(fields[3], 16) & _UNIX_LISTENS), fields[7]


def _socket_inode(target: str) -> int | None:
    if target.startswith("socket:[") and target[8:-1].isdigit():
        return int(target[8:-1])
    return None


def _owners_of(inodes: set[int]) -> list[int]:
    owners: list[int] = []
    for entry in Path("/proc").iterdir() if inodes else ():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # gone, or not ours
            targets = (Path(fd.path).readlink() for fd in os.scandir(entry / "fd"))
            if any(_socket_inode(str(target)) in inodes for target in targets):
                owners.append(int(entry.name))
    return owners
