"""The guard: a process of its own that lets the VM go on if the snapshotter dies while it is
stopped (invariant 4).

Run as a plain script, with nothing but the standard library, so that it starts in milliseconds::

    guard_process.py QMP_FD CONTROL_FD

It shares the snapshotter's monitor connection, because QEMU serves one client a monitor. On
CONTROL it reads ``A`` (the VM is about to be stopped) and ``D`` (it goes on again); at the end of
CONTROL, which the kernel brings about however the snapshotter ends, an armed guard sends
``cont``. Whatever was half written on the connection is flushed from QEMU's parser first by a
byte that no JSON contains (QEMU ``docs/interop/qmp-spec.rst``, section 2.6).
"""

import os
import signal
import socket
import sys

RESUME = b'\xff\n{"execute": "cont", "id": "stillframe-guard"}\n'
ANSWER = b'"stillframe-guard"'
RESEND_S = 10.0


def read_until_end(control: int) -> bool:
    """Follow the snapshotter; True if it died while the VM was stopped."""
    armed = False
    while True:
        command = os.read(control, 1)
        if not command:
            return armed
        armed = command == b"A"


def resume(monitor: socket.socket) -> None:
    """Send ``cont`` until QEMU has answered it or is gone; a ``stop`` that drains slow disks may
    keep the answer back for long, and would be forgotten if the connection ended before."""
    monitor.settimeout(RESEND_S)
    while True:
        try:
            monitor.sendall(RESUME)
            answer = b""
            while ANSWER not in answer:
                part = monitor.recv(65536)
                if not part:
                    return
                answer = (answer + part)[-65536:]
            return
        except TimeoutError:
            continue
        except OSError:
            return


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    monitor = socket.socket(fileno=int(sys.argv[1]))
    control = int(sys.argv[2])
    os.write(control, b"R")
    if read_until_end(control):
        resume(monitor)


if __name__ == "__main__":
    main()
