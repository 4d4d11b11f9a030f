"""VMs as libvirt, Proxmox, quickemu, vagrant-qemu, Lima, Boxes and tutorials start them: each is
taken and restored, and the guest goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stillframe import api
from stillframe.doctor.survey import SurveyedVm
from stillframe.errors import UsageError
from stillframe.machine.finding import connect
from tests.support.both_qemus import both_qemus  # noqa: F401 - a fixture
from tests.support.command_lines import names, tool_vm
from tests.support.listening import wait_listening
from tests.support.restoring import Restores
from tests.support.round_trip import devices, media, round_trip
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("both_qemus")]


@pytest.mark.parametrize("name", [name for name in names() if not name.endswith("-human")])
def test_it_is_taken_and_restored(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with (
        tool_vm(name, home) as vm,
        round_trip(str(vm.pid), tmp_path) as trip,
        connect(str(vm.pid)) as old,
    ):
        assert bool(trip.record.command_line) == ("-readconfig" in vm.words)
        assert devices(trip.new) == devices(old)
        if "-snapshot" not in vm.words:  # else QEMU's own file without a name is on top of them
            assert trip.record.differences == ()
            assert media(trip.new) == media(old)
        assert trip.new.status() == old.status() == "running"
        blocks: Any = trip.new.qmp.execute("query-block")
        shown = [block["inserted"] for block in blocks if "inserted" in block]
        written = [one["file"] for one in shown if not one["ro"]]
        assert written
        assert all(f"{tmp_path}/vm/disk" in file for file in written)


HUMAN = [name for name in names() if name.endswith("-human")]
ON_A_SOCKET = ["quickemu-human", "vagrant-qemu-human"]


def _seen(pid: int) -> SurveyedVm:
    (seen,) = [one for one in api.survey() if one.pid == pid]
    return seen


@pytest.mark.parametrize("name", ON_A_SOCKET)
def test_one_with_a_human_monitor_is_saved_by_qemu_and_restored(tmp_path: Path, name: str) -> None:
    home, file = tmp_path / "home", tmp_path / "x.still"
    home.mkdir()
    restores = Restores(tmp_path)
    with tool_vm(name, home) as vm:
        assert vm.monitor is None
        pid = vm.pid
        wait_until(lambda: _seen(pid).snapshotable is True)  # its socket is there
        seen = _seen(pid)
        assert seen.without_disks
        monitor = re.search(r"monitor for people only, (\S+):", seen.reasons[0])
        assert monitor is not None
        wait_listening(monitor[1])
        try:
            taken = api.take(str(vm.pid), file).wait(120)
            assert any("human monitor" in note for note in taken.notes)
            restored = restores.restore(file)
            with connect(restored.qmp_address) as new:
                assert new.status() == "running"
        finally:
            restores.close()


@pytest.mark.parametrize("name", sorted(set(HUMAN) - set(ON_A_SOCKET)))
def test_one_with_another_human_monitor_is_refused(tmp_path: Path, name: str) -> None:
    """What its remedy says is carried out in ``test_live_places``."""
    with tool_vm(name, tmp_path) as vm:
        assert vm.monitor is None
        with pytest.raises(UsageError, match="no QMP monitor") as refused:
            connect(str(vm.pid))
        assert "stillframe import" in (refused.value.remedy or "")
