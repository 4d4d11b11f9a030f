"""Requests under way in a QEMU's virtio disks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from stillframe.machine.qemu import disk_requests
from stillframe.machine.qemu.disk_requests import stuck_requests
from stillframe.qmp.command import QmpCommandError

DISK = "/machine/peripheral/d/virtio-backend"


class FakeQemu:
    """A virtio-blk disk with four queues; ``busy``: those with a request in use."""

    def __init__(self, busy: int | None) -> None:
        self.busy = busy
        self.asked: list[str] = []

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> object:
        self.asked.append(command)
        if command == "query-block":
            return [{"qdev": DISK, "device": "d", "inserted": {"drv": "raw", "file": "d.raw"}}]
        if command == "x-query-virtio":
            return [{"path": DISK, "name": "virtio-blk"}]
        if command == "x-query-virtio-queue-status" and arguments and arguments["queue"] < 4:
            return {"inuse": int(arguments["queue"] == self.busy), "used-idx": 7}
        raise QmpCommandError(command, "GenericError", "Invalid virtqueue number")


class FakeInspection:
    status = "running"

    def __init__(self, qmp: FakeQemu) -> None:
        self.qmp = qmp
        self.info = type("Info", (), {"pid": 1})


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_requests, "file_requests", lambda _pid: set())
    monkeypatch.setattr(disk_requests, "stuck", lambda look: sorted({name for name, _ in look()}))


@pytest.mark.parametrize(("busy", "found"), [(None, 0), (0, 1), (3, 1)])
def test_every_queue_is_looked_at(busy: int | None, found: int) -> None:
    qemu = FakeQemu(busy)
    blockers = list(stuck_requests(cast("Any", FakeInspection(qemu))))
    assert len(blockers) == found
    assert all("d.raw" in one.reason for one in blockers)


def test_nothing_that_a_qemu_dies_of_is_asked() -> None:
    """QEMU 11.1.3 aborts at ``x-query-virtio-status`` (an assertion in its reply)."""
    qemu = FakeQemu(None)
    list(stuck_requests(cast("Any", FakeInspection(qemu))))
    assert "x-query-virtio-status" not in qemu.asked
