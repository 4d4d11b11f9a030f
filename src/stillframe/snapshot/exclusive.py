"""One snapshot per VM at a time, over all processes of the host.

A listening abstract unix socket named after the VM's process: it needs no file, is gone when its
owner dies, and tells the owner's pid (SO_PEERCRED). Source: unix(7).
"""

from __future__ import annotations

import errno
import socket
import struct
from types import TracebackType

from stillframe.errors import BusyError, HostError


class VmLock:
    """Held while a snapshot of process ``pid`` is under way; the guest is not touched.

    Args:
        start_time: of the process, from /proc/PID/stat; tells it from a later one of its pid.

    Raises:
        BusyError: somebody else holds it; the message names the process.
    """

    def __init__(self, pid: int, start_time: int) -> None:
        name = f"\0stillframe-{pid}-{start_time}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(name)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise HostError("cannot lock the VM", why=error.strerror) from error
            raise BusyError(
                f"another snapshot of VM process {pid} is under way",
                why=f"process {_holder(name)} takes it",
                remedy="wait for it to end, or cancel it",
                guest_state="running",
            ) from error

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> VmLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _holder(name: str) -> str:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.5)
            probe.connect(name)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return str(struct.unpack("=iII", credentials)[0])
    except OSError:
        return "unknown"
