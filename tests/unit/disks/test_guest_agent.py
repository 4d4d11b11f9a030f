"""The guest agent's client, against a fake agent on a unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from stillframe.disks import guest_agent
from stillframe.disks.agent_channel import AgentPlace
from stillframe.disks.guest_agent import GuestAgent
from stillframe.disks.point_in_time import DiskOptions, Heir, disks_of
from stillframe.errors import BusyError, MachineError, RefusedError
from stillframe.machine import Machine
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError


class FakeAgent:
    """Answers as qemu-ga does, with ``answer``; ``silent`` names what it leaves unanswered, and
    ``late`` what it answers when it is asked the next time."""

    def __init__(
        self,
        path: Path,
        *,
        silent: str = "",
        late: str = "",
        refuse: str = "",
        stale: bytes = b"",
        answer: bytes = b'{"return": 2}',
    ) -> None:
        self.asked: list[str] = []
        self._silent, self._refuse, self._stale = silent, refuse, stale
        self._late, self._owed = late, b""
        self._reply = answer + b"\n"
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            link, _ = self._server.accept()
        except OSError:
            return
        # Nobody listens to all that it says.
        with contextlib.suppress(OSError), link, link.makefile("rb") as lines:
            link.sendall(self._stale)
            for text in lines:
                line = text.lstrip(b"\xff").strip()
                if not line:
                    continue
                request = json.loads(line)
                name = request["execute"]
                self.asked.append(name)
                if name == self._silent:
                    continue
                if name == self._late:
                    self._owed = self._reply
                    continue
                link.sendall(self._owed)
                self._owed = b""
                if name == self._refuse:
                    link.sendall(b'{"error": {"class": "GenericError", "desc": "no"}}\n')
                elif name == "guest-sync-delimited":
                    number = request["arguments"]["id"]
                    link.sendall(b"\xff" + json.dumps({"return": number}).encode() + b"\n")
                else:
                    link.sendall(self._reply)

    def close(self) -> None:
        self._server.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "_ANSWER_S", 0.3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qga"


def agent_at(path: Path) -> GuestAgent:
    no_monitor = cast("QmpClient", None)  # which one with a socket does not need
    return GuestAgent(AgentPlace(str(path)), no_monitor)


def test_freezes_and_thaws(path: Path) -> None:
    fake = FakeAgent(path, stale=b'{"return": 7}\n')
    agent = agent_at(path)
    assert agent.freeze() == 2
    assert agent.frozen
    agent.thaw()
    agent.thaw()
    assert fake.asked == ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
    agent.close()
    fake.close()


def test_an_answer_that_comes_late_is_not_taken_for_the_next_ones(path: Path) -> None:
    """It froze after all: what a thaw says must be the thaw's own answer."""
    fake = FakeAgent(path, late="guest-fsfreeze-freeze", refuse="guest-fsfreeze-thaw")
    agent = agent_at(path)
    with pytest.raises(MachineError, match="did not answer"):
        agent.freeze()
    with pytest.raises(MachineError, match="refused"):
        agent.thaw()
    assert agent.frozen
    agent.close()
    fake.close()


def test_an_agent_that_answers_late_is_told_to_thaw_all_the_same(path: Path) -> None:
    fake = FakeAgent(path, silent="guest-fsfreeze-freeze")
    agent = agent_at(path)
    with pytest.raises(MachineError, match="did not answer"):
        agent.freeze()
    agent.thaw()
    assert not agent.frozen
    assert fake.asked[-1] == "guest-fsfreeze-thaw"
    agent.close()
    fake.close()


def test_closing_thaws(path: Path) -> None:
    fake = FakeAgent(path)
    agent = agent_at(path)
    agent.freeze()
    agent.close()
    assert fake.asked[-1] == "guest-fsfreeze-thaw"
    fake.close()


@pytest.mark.parametrize("how", ["silent", "refuse"])
def test_a_freeze_that_fails_is_thawed(path: Path, how: str) -> None:
    command = "guest-fsfreeze-freeze"
    fake = FakeAgent(path, silent=command) if how == "silent" else FakeAgent(path, refuse=command)
    agent = agent_at(path)
    with pytest.raises(MachineError, match="guest-fsfreeze-freeze"):
        agent.freeze()
    agent.close()
    assert fake.asked[-1] == "guest-fsfreeze-thaw"
    fake.close()


def test_a_silent_agent_is_refused_in_time(path: Path) -> None:
    fake = FakeAgent(path, silent="guest-sync-delimited")
    with pytest.raises(RefusedError, match="guest-agent-silent"):
        agent_at(path)
    fake.close()


@pytest.mark.parametrize("stale", [b"[" * 200_000 + b"\n", b"x" * (2 << 20)])
def test_a_guest_that_says_anything_is_refused(path: Path, stale: bytes) -> None:
    fake = FakeAgent(path, stale=stale)
    with pytest.raises(BusyError):
        agent_at(path)
    fake.close()


def test_a_guest_that_says_something_else_for_ever_is_refused_in_time(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(1)

        def chatter() -> None:
            link, _ = server.accept()
            with link, contextlib.suppress(OSError):
                for _ in range(600):
                    link.sendall(b'{"return": 1}\n')
                    time.sleep(0.1)

        threading.Thread(target=chatter, daemon=True).start()
        began_s = time.monotonic()
        with pytest.raises(RefusedError, match="guest-agent-silent"):
            agent_at(path)
        assert time.monotonic() - began_s < 30


@pytest.mark.parametrize(
    "answer", [b"7", b"{}", b'{"error": {"desc": "\\ud800' + b"x" * 999 + b'"}}']
)
def test_an_answer_that_is_none_is_an_error_that_can_be_written(path: Path, answer: bytes) -> None:
    fake = FakeAgent(path, answer=answer)
    with pytest.raises(MachineError) as failed:
        agent_at(path).freeze()
    assert len(str(failed.value).encode()) < 500
    fake.close()


def test_an_agent_that_libvirt_does_not_reach_is_refused() -> None:
    class Bridge:
        def execute(self, command: str, *_: object, **__: object) -> object:
            raise QmpCommandError(command, "GenericError", "agent is not connected")

    with pytest.raises(RefusedError, match="not connected"):
        GuestAgent(AgentPlace(), cast("QmpClient", Bridge()))


def test_what_is_no_qemu_has_no_agent() -> None:
    options = DiskOptions(quiesce=True)
    with pytest.raises(RefusedError, match="no-guest-agent"):
        disks_of(cast("Machine", object()), options, cast("Heir", None))
