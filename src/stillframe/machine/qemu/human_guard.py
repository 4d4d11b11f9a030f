"""A client of a human monitor; also a guard process that brings a VM back to normal if we die while
QEMU saves it for us (invariant 4).

Runs as a plain script, with nothing but the standard library, so that it starts in milliseconds::

    human_guard.py MONITOR_FD CONTROL_FD STREAM_FD background|stop

It shares our connection, because QEMU serves one client a monitor, and the read end of the pipe
that QEMU writes to. On CONTROL it reads ``A`` (QEMU saves) and ``D`` (all is normal). When
CONTROL closes, an armed guard reads a background snapshot to its end: QEMU before 8.1 leaves RAM
write-protected if the reader goes away, and the guest hangs for good (QEMU commit 3a8b81f2e6). A
stopped guest continues at once.
"""

import os
import signal
import socket
import sys
import time

PROMPT = b"(qemu) "
ANSWER_S = 60.0
QUIET_S = 0.5
PAUSE_S = 0.1
TRIES = 6000
CAPABILITY = "background-snapshot"
FD = "stillframe"


def say(monitor: socket.socket, line: str, fd: int | None = None) -> str:
    """Send one line, with a descriptor if given; return the answer, empty on success.

    Raises:
        OSError: QEMU does not answer, or is gone.
    """
    words = line.encode() + b"\n"
    if fd is None:
        monitor.sendall(words)
    else:
        socket.send_fds(monitor, [words], [fd])
    return hear(monitor).partition("\n")[2].replace("\r", "").strip()


def hear(monitor: socket.socket) -> str:
    """Read up to the next prompt. Raises OSError."""
    heard = b""
    while not heard.endswith(PROMPT):
        part = monitor.recv(65536)
        if not part:
            raise ConnectionError("the monitor hung up")
        heard += part
    return heard.removesuffix(PROMPT).decode(errors="replace")


def give_up(monitor: socket.socket, stream: int, mode: str) -> None:
    """Let QEMU write to the end, or fail if the guest is stopped for it. Afterwards the monitor
    holds answers that no caller has read: QEMU may not answer while it writes.

    Raises:
        OSError: QEMU is gone.
    """
    monitor.sendall(f"closefd {FD}\n".encode())  # the migration may not have begun
    if mode == "background":
        drain(stream)
    os.close(stream)


def drain(stream: int) -> None:
    """Read to the end of the stream."""
    while os.read(stream, 1 << 20):
        pass


def go_on(monitor: socket.socket, mode: str) -> bool:
    """Let the guest run, and make QEMU's next migration an ordinary one; return whether QEMU
    confirms it. QEMU refuses both while a migration ends.

    Raises:
        OSError: QEMU does not answer, or is gone.
    """
    for _ in range(TRIES):
        if mode == "stop":
            say(monitor, "cont")
            if "running" in say(monitor, "info status"):
                return True
        else:
            say(monitor, f"migrate_set_capability {CAPABILITY} off")
            if f"{CAPABILITY}: off" in say(monitor, "info migrate_capabilities"):
                return True
        time.sleep(PAUSE_S)
    return False


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    monitor = socket.socket(fileno=int(sys.argv[1]))
    control, stream, mode = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.write(control, b"R")
    armed = False
    while command := os.read(control, 1):
        armed = command == b"A"
    if not armed:
        return
    give_up(monitor, stream, mode)
    monitor.settimeout(QUIET_S)
    try:
        while monitor.recv(65536):
            pass  # answers to earlier commands
    except TimeoutError:
        pass
    monitor.settimeout(ANSWER_S)
    go_on(monitor, mode)


if __name__ == "__main__":
    main()
