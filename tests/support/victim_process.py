"""The process of ``tests/native/victim.c``, which checks its own state."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from dataclasses import dataclass

from tests.support.native_build import build


@dataclass(frozen=True)
class VictimStatus:
    loops: int
    errors: int
    interrupted: int
    rt_signals: int
    usr1_signals: int
    alarms: int
    suspended: int
    result: int


class VictimProcess:
    """A running victim; ended with the context."""

    def __init__(self, mode: str) -> None:
        program = build("tests/native/victim.c")
        ours, theirs = socket.socketpair()
        self.channel = ours
        self.process = subprocess.Popen(
            [str(program), mode, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def command(self, line: str = "s") -> VictimStatus:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], 60)[0]:
            raise TimeoutError("the victim does not answer")
        return VictimStatus(*map(int, self.process.stdout.readline().split()))

    def assert_unharmed(self) -> VictimStatus:
        """It runs on, and none of its checks ever failed."""
        before = self.command()
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            status = self.command()
            assert status.errors == 0, f"failed checks {status.errors:#x}"
            if status.loops > before.loops + 1:
                return status
            select.select([], [], [], 0.02)
        raise AssertionError("the victim stands still")

    def open_userfaultfds(self) -> int:
        directory = f"/proc/{self.pid}/fd"
        links = (os.readlink(f"{directory}/{name}") for name in os.listdir(directory))
        return sum("userfaultfd" in link for link in links)

    def __enter__(self) -> VictimProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait(timeout=60)
        for pipe in (self.process.stdin, self.process.stdout, self.channel):
            if pipe is not None:
                pipe.close()
