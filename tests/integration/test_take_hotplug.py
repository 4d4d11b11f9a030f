"""RAM blocks that come and go while a real QEMU is taken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import SnapshotFailed
from stillframe.machine.finding import connect
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.snapshot.encoders import Encoders
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.bare_vm import BareVm
from tests.support.probes import has_qemu, has_uffd_wp
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not has_qemu(), reason=f"missing qemu: {has_qemu().reason}"),
]

NIC = {"driver": "virtio-net-pci", "id": "hot"}
DIMM = {"driver": "pc-dimm", "id": "dimm0", "memdev": "d0"}
BACKEND = {"qom-type": "memory-backend-ram", "id": "d0", "size": 128 << 20}


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


def plug(vm: BareVm, *devices: dict[str, object]) -> None:
    with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
        for device in devices:
            qmp.execute("object-add" if "qom-type" in device else "device_add", device)


@pytest.mark.parametrize("devices", [(NIC,), (BACKEND, DIMM)], ids=["nic", "dimm"])
def test_what_is_plugged_in_after_the_instant_is_noted(
    devices: tuple[dict[str, object], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.still"
    drain, plugged = Encoders.drain, threading.Event()

    def later(encoders: Encoders, *arguments: Any) -> None:
        plugged.wait(120)
        drain(encoders, *arguments)

    monkeypatch.setattr(Encoders, "drain", later)
    with BareVm("-nodefaults", "-m", "64,slots=2,maxmem=1G") as vm, connect(vm.qmp) as machine:
        job = SnapshotJob(
            lambda control: take_snapshot(control, machine, LocalSink(file), SnapshotOptions())
        )
        try:
            wait_until(lambda: job.stats.phase == "saving")
            plug(vm, *devices)
        finally:
            plugged.set()
        found = job.wait(60)
    assert any("appeared after the instant" in note for note in found.notes)
    with open_snapshot(file) as snapshot:
        assert all(block.idstr != "d0" for block in snapshot.blocks)
        assert snapshot.verify().missing_pages == 0


def test_what_is_plugged_in_before_the_instant_and_not_listed_fails(tmp_path: Path) -> None:
    """Else the device state would know a block that the file does not hold."""
    with BareVm("-nodefaults", "-m", "64") as vm, connect(vm.qmp) as machine:
        listed = machine.ram_blocks

        def then_plug() -> list[RamBlock]:
            blocks = listed()
            plug(vm, NIC)
            return blocks

        machine.ram_blocks = then_plug  # type: ignore[method-assign]
        job = SnapshotJob(
            lambda control: take_snapshot(
                control, machine, LocalSink(tmp_path / "a.still"), SnapshotOptions()
            )
        )
        with pytest.raises(SnapshotFailed, match="before the instant") as caught:
            job.wait(60)
        assert "appeared" in (caught.value.why or "")
        assert not (tmp_path / "a.still").exists()
        assert machine.status() == "running"
