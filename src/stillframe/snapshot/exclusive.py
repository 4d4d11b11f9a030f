"""The lock that allows one snapshot per VM at a time, across all processes of the host.

It is a listening abstract unix socket named after the VM's process: it needs no file, disappears
when its owner dies, and reveals the owner's pid (SO_PEERCRED). Source: unix(7).
"""

from __future__ import annotations

import errno
import socket
import struct

from stillframe.errors import BusyError, HostError


class VmLock:
    """The lock on one VM, held from construction to :meth:`close`; the guest is not touched.

    Args:
        vm: the lock's name (``Machine.lock_name``).

    Raises:
        BusyError: another process holds it; the message names the process.
    """

    def __init__(self, vm: str) -> None:
        name = f"\0stillframe-{vm}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(name)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise HostError("cannot lock the VM", why=error.strerror) from error
            raise BusyError(
                "another snapshot of the VM is under way",
                why=f"process {_holder(name)} takes it, or watches the VM",
                remedy="wait for it to end, or end it",
                guest_state="running",
            ) from error

    def close(self) -> None:
        self._socket.close()


def _holder(name: str) -> str:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.5)
            probe.connect(name)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return str(struct.unpack("=iII", credentials)[0])
    except OSError:
        return "unknown"
