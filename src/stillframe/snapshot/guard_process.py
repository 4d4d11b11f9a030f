"""The guard: a process of its own that lets the VM go on if the snapshotter dies while it is
stopped (invariant 4).

Run as a plain script, with nothing but the standard library, so that it starts in milliseconds::

    guard_process.py QMP_FD CONTROL_FD

It shares the snapshotter's monitor connection, because QEMU serves one client a monitor. On
CONTROL it reads ``A`` (the VM is about to be stopped), ``D`` (it goes on again) and ``W`` with a
last will: block jobs to give up, a guest agent to thaw by, overlays to fold back. At the end of
CONTROL, which the kernel brings about however the snapshotter ends, an armed guard sends
``cont``. Whatever was half written on the connection is flushed from QEMU's parser first by a
byte that no JSON contains (QEMU ``docs/interop/qmp-spec.rst``, section 2.6).
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
    """Follow the snapshotter; whether it died while the VM was stopped, and its last will."""
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
    """So many bytes; none if the snapshotter died in the middle."""
    data = b""
    while len(data) < length:
        part = stream.read(length - len(data))
        if not part:
            return b""
        data += part
    return data


def ask(monitor: socket.socket, line: bytes, mark: bytes, keep: int = 65536) -> bytes:
    """Send a command until QEMU has answered it or is gone; a ``stop`` that drains slow disks may
    keep the answer back for long, and would be forgotten if the connection ended before."""
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
    """Let the guest go on; while a dump runs, QEMU refuses."""
    for _ in range(REFUSED_TRIES):
        answer = ask(monitor, RESUME, ANSWER)
        if not any(b'"error"' in line for line in answer.splitlines() if ANSWER in line):
            return
        time.sleep(REFUSED_PAUSE_S)


def carry_out(monitor: socket.socket, lines: list[str]) -> None:
    """Run the last will's commands. What is still in use is tried again, and an agent that does
    not answer; what is not there any more is not. Then a guest that stopped at a write that could
    not be copied goes on."""
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
    """Let the VM go on on its image, which takes what an overlay holds; then remove that."""
    carry_out(monitor, fold["finish"])
    if is_named(monitor, "query-block", fold["path"]):
        carry_out(monitor, fold["begin"] + fold["finish"])
    carry_out(monitor, fold["remove"])
    if is_named(monitor, "query-named-block-nodes", fold["path"]) is False:
        with contextlib.suppress(OSError):
            os.unlink(fold["path"])  # noqa: PTH108 - pathlib takes its time to import


def is_named(monitor: socket.socket, query: str, path: str) -> bool | None:
    """Whether QEMU's answer names that overlay; None if it does not answer."""
    mark = b'"stillframe-query"'
    line = b'{"execute": "%s", "id": %s}\n' % (query.encode(), mark)
    answer = ask(monitor, line, mark, keep=1 << 24)
    ours = next((part for part in answer.splitlines() if mark in part), b"")
    if b'"return"' not in ours:
        return None
    # The end of the name is unique, and written alike by everybody.
    return path[path.rindex(".stillframe-") :].encode() in ours


def thaw(path: str) -> None:
    """Have the guest agent thaw the guest; it takes one client, and ours has just gone. A guest
    that says something else all the time does not keep us."""
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
    """Not we are the one to be killed for want of memory (``snapshot/memory_limit.py``)."""
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
        monitor.close()  # a thaw may take long, and others want to use it
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
