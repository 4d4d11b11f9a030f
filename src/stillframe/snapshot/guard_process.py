"""The guard: a separate process that resumes the VM if the snapshotter dies while the VM is
stopped (invariant 4).

It is a plain script on the standard library alone, so that it starts in milliseconds::

    guard_process.py QMP_FD CONTROL_FD

It shares the snapshotter's monitor connection, because a QEMU monitor serves one client. From
CONTROL it reads ``A`` (the VM is about to be stopped), ``D`` (the VM runs again) and ``W`` with a
last will: block jobs to cancel, a guest agent to thaw through, overlays to fold back. At EOF on
CONTROL, which the kernel delivers however the snapshotter ends, an armed guard sends ``cont``.
First it flushes a half-written command from QEMU's parser with a byte that no JSON contains
(QEMU ``docs/interop/qmp-spec.rst``, section 2.6).
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from io import RawIOBase
from typing import Any

RESUME = b'\xff\n{"execute": "cont", "id": "stillframe-guard"}\n'
ANSWER = b'"stillframe-guard"'
RESEND_S = 10.0
REFUSED_PAUSE_S = 0.5
REFUSED_TRIES = 600
RETRY_S = 0.05
TRIES = 100
READY_TRIES = 12000
THAW_S = 120.0
BY_LIBVIRT = '"stillframe-agent"'
THAW = b'\xff\n{"execute": "guest-fsfreeze-thaw"}\n'


def read_until_end(control: int) -> tuple[bool, dict[str, Any]]:
    """Follow the snapshotter to its end; return whether the guard is armed, and the last will."""
    armed = False
    will: dict[str, Any] = {}
    with os.fdopen(control, "rb", buffering=0) as stream:
        while command := stream.read(1):
            if command == b"W":
                text = read_exactly(stream, int.from_bytes(read_exactly(stream, 4), "big"))
                will = json.loads(text) if text else will
            else:
                armed = command == b"A"
    return armed, will


def read_exactly(stream: RawIOBase, length: int) -> bytes:
    """Read ``length`` bytes; return none if the snapshotter died in the middle."""
    data = b""
    while len(data) < length:
        part = stream.read(length - len(data))
        if not part:
            return b""
        data += part
    return data


def ask(monitor: socket.socket, line: bytes, mark: bytes, keep: int = 65536) -> bytes:
    """Repeat a command until QEMU answers or is gone; return the answer, empty if QEMU is gone.

    A ``stop`` that drains slow disks may delay the answer for long, and QEMU would forget the
    command if the connection closed before."""
    monitor.settimeout(RESEND_S)
    while True:
        try:
            monitor.sendall(line)
            answer = b""
            while mark not in answer.rpartition(b"\n")[0]:
                part = monitor.recv(65536)
                if not part:
                    return b""
                answer = (answer + part)[-keep:]
            return answer
        except TimeoutError:
            continue
        except OSError:
            return b""


def resume(monitor: socket.socket) -> None:
    """Resume the guest; try again while QEMU refuses, as it does during a dump."""
    for _ in range(REFUSED_TRIES):
        answer = ask(monitor, RESUME, ANSWER)
        if not any(b'"error"' in line for line in answer.splitlines() if ANSWER in line):
            return
        time.sleep(REFUSED_PAUSE_S)


def carry_out(monitor: socket.socket, lines: list[str]) -> None:
    """Run the last will's commands, then resume a guest that stopped with an I/O error because a
    write could not be copied.

    A command is repeated while its object is in use, its job is not ready, or the agent does not
    answer; not if its object is gone."""
    until_s = time.monotonic() + THAW_S
    for line in lines:
        mark = b'"id": "%s"' % json.loads(line)["id"].encode()
        for _ in range(READY_TRIES if "job-complete" in line else TRIES):
            answer = ask(monitor, line.encode() + b"\n", mark)
            ours = next((part for part in answer.splitlines() if mark in part), b"")
            early = b"cannot accept command verb" in ours and b"'concluded'" not in ours
            thaws = BY_LIBVIRT in line and time.monotonic() < until_s
            if b'"error"' not in ours or not (early or b"in use" in ours or thaws):
                break
            time.sleep(RETRY_S)
    status = b'{"execute": "query-status", "id": "stillframe-status"}\n'
    if b'"io-error"' in ask(monitor, status, b'"stillframe-status"'):
        resume(monitor)


def fold_back(monitor: socket.socket, fold: dict[str, Any]) -> None:
    """Commit an overlay into the VM's image, pivot the VM to the image, and remove the overlay."""
    carry_out(monitor, fold["finish"])
    if is_named(monitor, "query-block", fold["path"]):
        carry_out(monitor, fold["begin"] + fold["finish"])
    carry_out(monitor, fold["remove"])
    if is_named(monitor, "query-named-block-nodes", fold["path"]) is False:
        with contextlib.suppress(OSError):
            os.unlink(fold["path"])  # noqa: PTH108 - pathlib is slow to import


def is_named(monitor: socket.socket, query: str, path: str) -> bool | None:
    """Return whether QEMU's answer to ``query`` names the overlay; None without an answer."""
    mark = b'"stillframe-query"'
    line = b'{"execute": "%s", "id": %s}\n' % (query.encode(), mark)
    answer = ask(monitor, line, mark, keep=1 << 24)
    ours = next((part for part in answer.splitlines() if mark in part), b"")
    if b'"return"' not in ours:
        return None
    # The end of the name is unique, and spelled the same everywhere.
    return path[path.rindex(".stillframe-") :].encode() in ours


def thaw(path: str) -> None:
    """Have the guest agent thaw the guest. The agent serves one client, so retry until the
    snapshotter's connection is gone; a guest that keeps sending other output is given up."""
    until_s = time.monotonic() + THAW_S
    for _ in range(TRIES):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
                agent.settimeout(RESEND_S)
                agent.connect(path)
                agent.sendall(THAW)
                said = b""
                while time.monotonic() < until_s and (part := agent.recv(65536)):
                    said = (said + part)[-65536:]
                    if b'"return"' in said:
                        return
        except OSError:
            pass
        if time.monotonic() >= until_s:
            return
        time.sleep(RETRY_S)


def outlive_snapshotter() -> None:
    """Reset the inherited OOM score, so that the OOM killer takes the snapshotter, not the guard
    (``snapshot/memory_limit.py``)."""
    with contextlib.suppress(OSError):
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(score, b"0")
        os.close(score)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    outlive_snapshotter()
    monitor = socket.socket(fileno=int(sys.argv[1]))
    control = int(sys.argv[2])
    os.write(control, b"R")
    armed, will = read_until_end(control)
    if armed:
        resume(monitor)
    if not will.get("lines") and not will.get("folds"):
        monitor.close()  # a thaw may take long, and other clients wait for the monitor
    if will.get("agent"):
        thaw(will["agent"])
    if (will.get("lines") or will.get("folds")) and not armed:
        monitor.settimeout(RESEND_S)
        monitor.sendall(b"\xff\n")
    if will.get("lines"):
        carry_out(monitor, will["lines"])
    for fold in will.get("folds", []):
        fold_back(monitor, fold)


if __name__ == "__main__":
    main()
