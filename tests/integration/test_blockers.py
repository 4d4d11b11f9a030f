"""Migration blockers: what matters on another host only, and what leaves RAM to be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from stillframe import api
from stillframe.errors import RefusedError
from stillframe.machine import Mode
from stillframe.machine.process import host_cpu as host_cpu_module
from stillframe.machine.process.host_cpu import cpu_ties, difference, host_cpu
from stillframe.qmp.client import QmpClient
from stillframe.restore import qemu_plan as plan_module
from tests.support.bare_vm import BareVm
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_kvm, has_uffd_wp
from tests.support.run_states import state_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

SMALL = ("-nodefaults", "-m", "64")
NVME = ("-drive", "if=none,id=d,file=null-co://,format=raw", "-device", "nvme,serial=1,drive=d")


@pytest.fixture(autouse=True)
def _kernel() -> None:
    has_uffd_wp().require()


@pytest.fixture(params=["stock", "newer"])
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which QEMU the test's VMs are."""
    if request.param == "newer":
        monkeypatch.setenv("STILLFRAME_QEMU", require_newer_qemu())


def test_an_invariant_tsc_binds_the_snapshot_to_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_kvm().require()
    file = tmp_path / "a.still"
    with BareVm(*SMALL, "-accel", "kvm", "-cpu", "qemu64,+invtsc") as vm:
        taken = api.take(vm.qmp, file).wait(60)
        assert any(note.startswith("other-host: ") for note in taken.notes)
    with api.open(file) as snapshot:
        record = snapshot.manifest.machine
        assert record is not None
        assert record.host_cpu == host_cpu()
        assert any("invtsc" in tie for tie in record.cpu_ties)
    restored = api.restore(file, trust=True)
    assert restored.state == "running"
    os.kill(restored.pid, signal.SIGKILL)
    other = msgspec.structs.replace(host_cpu(), model="6", name="Elderly CPU")
    monkeypatch.setattr(plan_module, "host_cpu", lambda: other)
    with pytest.raises(RefusedError, match="Elderly CPU"):
        api.restore(file, trust=True)


def test_what_ties_a_guest_to_a_cpu() -> None:
    assert cpu_ties([], ["qemu", "-cpu", "host,migratable=off"])
    assert cpu_ties([], ["qemu", "-cpu", "host,hv-passthrough=on"])
    assert cpu_ties(["'hv-passthrough' CPU flag prevents migration, use ..."], [])
    assert not cpu_ties(["State blocked by non-migratable device 'x/nvme'"], ["-cpu", "host"])
    here = host_cpu()
    assert difference(here, here) is None
    more = msgspec.structs.replace(here, flags=f"{here.flags} of_the_future")
    assert "lacks of_the_future" in str(difference(more, here))
    assert difference(here, more) is None
    assert host_cpu_module.host_cpu().vendor


@pytest.mark.parametrize("kind", ["vmdk", "vdi"])
def test_an_image_format_that_two_hosts_must_not_share(
    qemu: None, kind: str, tmp_path: Path
) -> None:
    image, file = tmp_path / "disk", tmp_path / "a.still"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, image, "64M"], check=True)
    with BareVm(*SMALL, "-drive", f"file={image},format={kind},if=ide") as vm:
        taken = api.take(vm.qmp, file).wait(60)
        assert any("format used by node" in note for note in taken.notes)


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_ram_for_analysis_of_a_vm_that_cannot_be_saved(
    qemu: None, mode: Mode, tmp_path: Path
) -> None:
    file = tmp_path / "a.still"
    with BareVm(*SMALL, *NVME, "-device", "pci-serial-2x") as vm:
        with QmpClient.connect(vm.second_qmp, timeout_s=60) as qmp:
            # The BIOS has copied itself to RAM, and its clock ticks.
            wait_until(lambda: int(qmp.hmp("xp /1wx 0x46c").split(":")[1], 16))
        with pytest.raises(RefusedError, match="for-analysis"):
            api.take(vm.qmp, file, mode=mode).wait(60)
        taken = api.take(vm.qmp, file, mode=mode, for_analysis=True).wait(60)
        assert taken.notes[0].startswith("for analysis only")
        assert any("nvme" in note for note in taken.notes)
        with QmpClient.connect(vm.second_qmp, timeout_s=30) as qmp:
            assert state_of(qmp) == "running"
    with pytest.raises(RefusedError, match="for analysis only"):
        api.restore(file, trust=True)
    with pytest.raises(RefusedError, match="for analysis only"):
        api.export(file, tmp_path / "stream", format="qemu")
    api.export(file, tmp_path / "raw", format="raw", block="pc.ram")
    bios = (tmp_path / "raw").read_bytes()[0xF0000:0x100000]
    assert b"SeaBIOS" in bios or b"QEMU" in bios


def test_every_command_says_that_it_is_for_analysis(tmp_path: Path) -> None:
    file = tmp_path / "a.still"

    def said(*words: object) -> str:
        command = [sys.executable, "-m", "stillframe", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    with BareVm(*SMALL, *NVME) as vm:
        assert "for analysis only" in said("take", vm.qmp, "-o", file, "--for-analysis")
    assert "for analysis only" in said("show", file)
    assert json.loads(said("show", file, "--json"))["for_analysis"] is True
    assert "for analysis only" in said("verify", file)
    assert "for analysis only" in said("restore", file, "--trust")
    assert "for analysis only" in said("restore", file, "--dry-run")
    assert "for analysis only" in said(
        "export", file, "--format=raw", "--block=pc.ram", "-o", tmp_path / "raw"
    )
    assert "for analysis only" in said("export", file, "--format", "qemu", "-o", tmp_path / "q")
    assert not (tmp_path / "q").exists()
