"""Help for a domain whose libvirtd is dead: QEMU's own sockets are free then."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_TIMEOUT_S = 2.0


def cont_without_libvirt(uuid: str) -> bool:
    """Send ``cont`` to the monitor that libvirtd held; return whether the VM answered.

    A libvirtd that starts later reads the state from QEMU (libvirt ``src/qemu/qemu_process.c``:
    qemuProcessReconnect).
    """
    try:
        with _connected(uuid, "/monitor.sock") as sock:
            stream = sock.makefile("rwb")
            stream.readline()  # the greeting; none comes while another client is connected
            for command in ("qmp_capabilities", "cont"):
                stream.write(json.dumps({"execute": command, "id": command}).encode() + b"\n")
                stream.flush()
                while json.loads(stream.readline()).get("id") != command:
                    pass
    except (OSError, ValueError):
        return False
    return True


def thaw_without_libvirt(uuid: str) -> bool:
    """Have the guest agent thaw the file systems; return whether it answered."""
    try:
        with _connected(uuid, "/org.qemu.guest_agent.0") as sock:
            # The first byte makes the agent drop what libvirtd left half sent.
            sock.sendall(b'\xff\n{"execute": "guest-fsfreeze-thaw"}\n')
            deadline_s = time.monotonic() + _TIMEOUT_S
            said = b""
            while time.monotonic() < deadline_s and (part := sock.recv(65536)):
                said = (said + part)[-65536:]
                if b'"return"' in said:
                    return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def _connected(uuid: str, ending: str) -> Iterator[socket.socket]:
    """Connect to the socket of that name. Raises OSError: there is none, or it does not accept
    us."""
    path = _socket_path(uuid, ending)
    if path is None:
        raise FileNotFoundError(ending)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect(path)
        yield sock


def _socket_path(uuid: str, ending: str) -> str | None:
    """Return the path with this ending to which the QEMU with this ``-uuid`` has bound a socket."""
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"-uuid" not in words or words[words.index(b"-uuid") + 1] != uuid.encode():
                continue
            inodes = {str(fd.readlink())[8:-1] for fd in (process / "fd").iterdir()}
            table = (process / "net/unix").read_text(errors="surrogateescape")
        except (OSError, IndexError):
            continue
        for line in table.splitlines()[1:]:
            fields = line.split(None, 7)
            if len(fields) == 8 and fields[6] in inodes and fields[7].endswith(ending):
                return fields[7]
    return None
