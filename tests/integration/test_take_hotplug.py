"""RAM blocks that come and go while a real QEMU is taken."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from stillframe.errors import SnapshotFailed
from stillframe.machine.finding import connect
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.bare_vm import BareVm
from tests.support.probes import has_qemu, has_uffd_wp

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
    with QmpClient.connect(vm.second_qmp, timeout_s=10) as qmp:
        for device in devices:
            qmp.execute("object-add" if "qom-type" in device else "device_add", device)


@pytest.mark.parametrize("devices", [(NIC,), (BACKEND, DIMM)], ids=["nic", "dimm"])
def test_what_is_plugged_in_after_the_instant_is_noted(
    devices: tuple[dict[str, object], ...], tmp_path: Path
) -> None:
    file = tmp_path / "a.still"
    found: list[TakenSnapshot] = []
    with BareVm("-nodefaults", "-m", "64,slots=2,maxmem=1G") as vm:
        time.sleep(1)  # the BIOS
        with connect(vm.qmp) as machine:
            options = SnapshotOptions(max_bandwidth_bytes_per_s=60 << 10)
            job = SnapshotJob(
                lambda control: take_snapshot(control, machine, LocalSink(file), options)
            )
            waiter = threading.Thread(target=lambda: found.append(job.wait(60)))
            waiter.start()
            deadline = time.monotonic() + 10
            while job.stats.phase != "saving":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            plug(vm, *devices)
            assert waiter.is_alive(), "the take was over before"
            waiter.join(60)
    assert found
    assert any("appeared after the instant" in note for note in found[0].notes)
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
