"""What the guard does when the snapshotter dies: block jobs given up, the guest thawed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.disks.agent_channel import AgentPlace
from stillframe.disks.overlays import FoldWill
from stillframe.snapshot import guard as guard_module
from stillframe.snapshot.guard import Command, Guard
from tests.support.waiting import wait_until
from tests.unit.disks.test_guest_agent import FakeAgent

WILL: list[Command] = [
    ("block-job-cancel", {"device": "stillframe-0", "force": True}),
    ("job-dismiss", {"id": "stillframe-0"}),
    ("blockdev-del", {"node-name": "stillframe-0t"}),
]


class FakeMonitor:
    """Answers as QEMU does; a job is ``running`` for two tries of its dismissal, and an agent does
    not answer the first time."""

    def __init__(self, status: str = "running", names: str = "") -> None:
        self.asked: list[str] = []
        self._names = names
        self._status = status
        self._dismissals = 0
        self.ours, self._theirs = socket.socketpair()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._theirs, self._theirs.makefile("rb") as lines:
            for line in lines:
                if line.strip() == b"\xff":
                    continue
                request = json.loads(line)
                self.asked.append(request["execute"])
                reply: dict[str, object] = {"return": {"status": self._status}}
                if request["execute"] == "query-block":
                    reply = {"return": [{"file": self._names}]}
                if request["execute"] == "job-dismiss":
                    self._dismissals += 1
                    if self._dismissals < 3:
                        why = "Job in state 'running' cannot accept command verb 'dismiss'"
                        reply = {"error": {"class": "GenericError", "desc": why}}
                if self.asked == ["stillframe-agent"]:
                    reply = {"error": {"class": "AgentUnresponsive", "desc": "not connected"}}
                text = json.dumps(reply | {"id": request["id"]})
                self._theirs.sendall(text.encode() + b"\r\n")


@pytest.fixture
def monitor() -> Iterator[FakeMonitor]:
    monitor = FakeMonitor()
    yield monitor
    monitor.ours.close()


def test_a_death_gives_the_copies_up(monitor: FakeMonitor) -> None:
    guard = Guard(monitor.ours.fileno())
    guard.leave(WILL, None)
    guard.close()
    assert monitor.asked == [
        "block-job-cancel",
        *["job-dismiss"] * 3,
        "blockdev-del",
        "query-status",
    ]


def test_a_guest_that_stopped_at_a_copy_goes_on() -> None:
    monitor = FakeMonitor(status="io-error")
    guard = Guard(monitor.ours.fileno())
    guard.leave(WILL[:1], None)
    guard.close()
    monitor.ours.close()
    assert monitor.asked == ["block-job-cancel", "query-status", "cont"]


def test_a_death_thaws_the_guest(monitor: FakeMonitor, tmp_path: Path) -> None:
    fake = FakeAgent(tmp_path / "qga")
    guard = Guard(monitor.ours.fileno())
    guard.leave([], str(tmp_path / "qga"))
    guard.close()
    assert fake.asked == ["guest-fsfreeze-thaw"]
    assert monitor.asked == []
    fake.close()


def test_a_guard_that_is_to_thaw_stays_longer_than_we(
    monitor: FakeMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_END_S", 0.1)
    guard = Guard(monitor.ours.fileno())
    guard.leave([], str(tmp_path / "qga"))
    guard.close()
    fake = FakeAgent(tmp_path / "qga")
    wait_until(lambda: fake.asked == ["guest-fsfreeze-thaw"], within_s=60.0)
    fake.close()


def test_an_agent_of_libvirt_that_does_not_answer_is_asked_again(monitor: FakeMonitor) -> None:
    command = AgentPlace().thaw_command
    assert command is not None
    guard = Guard(monitor.ours.fileno())
    guard.leave([command], None)
    guard.close()
    assert monitor.asked == ["stillframe-agent", "stillframe-agent", "query-status"]


def test_a_cleared_will_does_nothing(monitor: FakeMonitor) -> None:
    guard = Guard(monitor.ours.fileno())
    guard.leave(WILL, "/nowhere")
    guard.leave([], None)
    guard.close()
    assert monitor.asked == []


def left_overlay(directory: Path) -> FoldWill:
    path = directory / "disk.qcow2.stillframe-0-0.qcow2"
    path.touch()
    job = {"id": "stillframe-fold-0"}
    return FoldWill(
        path=str(path),
        finish=(("job-complete", job),),
        begin=("block-commit", {"job-id": "stillframe-fold-0", "device": "stillframe-0"}),
        remove=("blockdev-del", {"node-name": "stillframe-0"}),
    )


@pytest.mark.parametrize("on_it", [False, True])
def test_a_death_folds_back_what_the_vm_is_on(tmp_path: Path, on_it: bool) -> None:
    """And never an overlay that was folded before: the image has later writes by then."""
    fold = left_overlay(tmp_path)
    monitor = FakeMonitor(names=fold.path if on_it else "/other")
    guard = Guard(monitor.ours.fileno())
    guard.leave([], None, [fold])
    guard.close()
    monitor.ours.close()
    asked = [name for name in monitor.asked if name != "query-status"]
    begun = ["block-commit", "job-complete"] if on_it else []
    ending = ["blockdev-del", "query-named-block-nodes"]
    assert asked == ["job-complete", "query-block", *begun, *ending]
    assert not Path(fold.path).exists()


def test_an_overlay_of_a_vm_that_does_not_answer_stays(tmp_path: Path) -> None:
    fold = left_overlay(tmp_path)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        guard = Guard(ours.fileno())
        guard.leave([], None, [fold])
        guard.close()
    assert Path(fold.path).exists()
