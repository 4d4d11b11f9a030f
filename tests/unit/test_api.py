"""The public functions: what they refuse before anything is touched, and how a job is followed."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

import pytest

import stillframe
from stillframe import api
from stillframe.errors import (
    BusyError,
    DataError,
    MachineError,
    NotFoundError,
    SinkError,
    UsageError,
)
from stillframe.model import MachineRecord
from stillframe.restore import fork, store_use
from stillframe.snapshot import taking, watching
from tests.support_store.stores import folder_store, machine, put


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spill_bytes": 0}, "spill"),
        ({"max_bandwidth_bytes_per_s": -1}, "bandwidth"),
        ({"mode": "fast"}, "mode"),
        ({"compression": "gzip"}, "compression"),
        ({"compression": "none", "level": 3}, "has no level"),
        ({"level": 20}, "compression level"),
    ],
)
def test_take_refuses(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        stillframe.take("no-such-vm", tmp_path / "a.still", **options)
    assert list(tmp_path.iterdir()) == []


def test_take_opens_the_destination_first(tmp_path: Path) -> None:
    (tmp_path / "a.still").touch()
    with pytest.raises(UsageError, match="exists already"):
        stillframe.take("no-such-vm", tmp_path / "a.still")
    with pytest.raises(SinkError, match="directory"):
        stillframe.take("no-such-vm", tmp_path / "none" / "a.still")


def test_a_failed_job_leaves_nothing(tmp_path: Path) -> None:
    phases: list[str] = []
    job = stillframe.take(
        "no-such-vm", tmp_path / "a.still", on_progress=lambda now: phases.append(now.phase)
    )
    with pytest.raises(NotFoundError, match="no-such-vm"):
        job.wait(30)
    assert job.state == "failed"
    assert phases == ["connecting"]
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_awaited_without_blocking_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = threading.Event()

    async def follow() -> int:
        ticks = 0
        job = stillframe.take("no-such-vm", tmp_path / "a.still")
        task = asyncio.ensure_future(_wait(job))
        while not task.done():
            ticks += 1
            if ticks > 10:
                enough.set()
            await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            await task
        return ticks

    async def _wait(job: stillframe.api.SnapshotJob) -> None:
        await job

    def slow(*_: object, **__: object) -> None:
        enough.wait(60)
        raise NotFoundError("gone")

    monkeypatch.setattr(taking, "connect", slow)
    assert asyncio.run(follow()) > 10
    assert enough.is_set()


def test_open_and_verify_what_is_not_there(tmp_path: Path) -> None:
    for function in (stillframe.open, stillframe.verify, stillframe.restore):
        with pytest.raises(NotFoundError):
            function(tmp_path / "none")


def test_export_refuses(tmp_path: Path) -> None:
    wrong: Any = "zip"
    with pytest.raises(UsageError, match="format"):
        stillframe.export(tmp_path / "none", tmp_path / "x", format=wrong)
    with pytest.raises(UsageError, match="holds all blocks"):
        stillframe.export(tmp_path / "none", tmp_path / "x", format="elf", block="pc.ram")
    with pytest.raises(NotFoundError):
        stillframe.export(tmp_path / "none", tmp_path / "x", format="raw")
    assert list(tmp_path.iterdir()) == []


def test_import_refuses(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        stillframe.import_stream(tmp_path / "none", tmp_path / "x")
    with pytest.raises(UsageError, match="is a directory"):
        stillframe.import_stream(tmp_path, tmp_path / "x")
    with pytest.raises(DataError):
        stillframe.import_stream(io.BytesIO(b"no stream"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_watch_prunes_a_vm_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store calls it by VMM and pid."""
    store = folder_store(tmp_path / "store")
    days = [f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2)]
    other, _, newest = (put(store, vm=vm, created=at) for vm, at in zip(
        ("other", "qemu-1", "qemu-1"), (days[0], *days), strict=True))  # fmt: skip

    class Connected:
        def __enter__(self) -> Connected:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def describe(self) -> MachineRecord:
            return machine("")

    class OneTurn:
        def __init__(self, connect: Any, *_: object, prune: Any, **_options: object) -> None:
            self._connect, self._prune = connect, prune

        def run(self) -> int:
            self._connect()
            self._prune()
            return 1

    monkeypatch.setattr(watching, "connect", lambda _vm: Connected())
    monkeypatch.setattr(watching, "Watching", OneTurn)
    assert api.watch("no-such-vm", store=store, keep_last=1) == 1
    assert [entry.id for entry in store.list()] == [other.id, newest.id]


def test_repair_forgets_nothing_that_a_vm_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = folder_store(tmp_path / "store")
    entry = put(store)
    Path(store.location(entry)).write_bytes(b"rot")
    with monkeypatch.context() as patch:
        patch.setattr(store_use, "vms_that_need", lambda _store: lambda _entry: "VM web1")
        assert api.repair(store=store, forget=True).needed == {entry.id: "VM web1"}
    assert api.repair(store=store, forget=True).forgotten == (entry.id,)


def test_a_watch_lets_a_vm_go_that_cannot_be_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Undescribed:
        def __enter__(self) -> Undescribed:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(True)

        def describe(self) -> None:
            raise MachineError("it went away")

    monkeypatch.setattr(watching, "connect", lambda _vm: Undescribed())
    store = api.init(tmp_path / "store")
    with pytest.raises(MachineError, match="went away"):
        api.watch("no-such-vm", store=store, count=1)
    assert closed == [True]


def test_a_fork_waits_for_the_image_before_it_asks_the_monitor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QEMU may not answer before: its main loop waits for a vCPU, and that for a page."""

    def waits(vm: str, _step: object) -> None:
        raise BusyError(f"the image of {vm} is being filled")

    monkeypatch.setattr(fork, "await_resident", waits)
    with pytest.raises(BusyError, match="no-such-vm"):
        stillframe.fork("no-such-vm")
