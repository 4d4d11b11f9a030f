"""``take --quiesce`` with a real guest agent in a real guest."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from guests.agent import agent_execute
from guests.agent_files import DISK_SERIAL
from guests.monitor import qmp_execute
from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import MachineError, RefusedError
from stillframe.restore import agents
from stillframe.restore.restored import RestoredVm, list_restored
from tests.support.guest_fixtures import GuestFactory
from tests.support.journal_vm import captured_path, manifest_of, nodes_of_ours, qemu_img
from tests.support.probes import has_uffd_wp
from tests.support.restored_vms import console
from tests.support.taking import PATIENT, PATIENT_MS, finish, start_take
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_SUPERBLOCK = 1024
_FEATURES = _SUPERBLOCK + 0x60
_NEEDS_RECOVERY = 0x4
"""``EXT4_FEATURE_INCOMPAT_RECOVER``: there while it is mounted, gone while it is frozen."""


@pytest.fixture
def vm(linux_guest: GuestFactory, tmp_path: Path) -> GuestVm:
    """With an agent that answers, and a second monitor (``second`` in ``tmp_path``)."""
    has_uffd_wp().require()
    monitor = f"unix:{tmp_path}/second,server=on,wait=off"
    vm = linux_guest(agent=True, mem_mib=8, rate_mib_per_s=2, extra=["-qmp", monitor])
    vm.wait_agent()
    wait_until(lambda: vm.command("write") == "write ok", within_s=60.0)
    return vm


def assert_thawed(vm: GuestVm) -> None:
    """Soon, since the guard of a take that is dead needs a moment."""

    def status() -> str:
        try:
            return str(vm.ask_agent("guest-fsfreeze-status", timeout_s=10))
        except MachineError as error:
            return str(error)

    wait_until(lambda: status() == "thawed", within_s=90.0)
    wait_until(lambda: vm.command("write") == "write ok", within_s=60.0)
    assert vm.is_progressing()
    assert nodes_of_ours(vm) == []


def captured_needs_recovery(file: Path, scratch: Path) -> bool:
    """Whether the file system of the agent's disk was in use at the snapshot's instant."""
    (disk,) = (disk for disk in manifest_of(file).captured_disks if disk.device == DISK_SERIAL)
    raw = scratch / "raw"
    image, image_format = captured_path(file, disk), disk.files[0].format
    qemu_img("convert", "-U", "-f", image_format, "-O", "raw", image, raw)
    content = raw.read_bytes()
    raw.unlink()
    assert struct.unpack_from("<H", content, _SUPERBLOCK + 0x38) == (0xEF53,)
    return bool(struct.unpack_from("<I", content, _FEATURES)[0] & _NEEDS_RECOVERY)


def test_the_file_system_is_at_rest_at_the_instant(vm: GuestVm, tmp_path: Path) -> None:
    for arguments, needs_recovery in (([], True), (["--quiesce"], False)):
        file = tmp_path / f"{len(arguments)}.still"
        code, _output, complaints = finish(
            start_take(vm, file, "--disks", "copy", *PATIENT, *arguments)
        )
        assert code == 0, complaints
        assert_thawed(vm)
        assert captured_needs_recovery(file, tmp_path) == needs_recovery


def test_one_that_stands_still_while_it_is_saved_is_thawed_afterwards(
    vm: GuestVm, tmp_path: Path
) -> None:
    file = tmp_path / "x.still"
    code, _output, complaints = finish(
        start_take(vm, file, "--quiesce", "--mode", "stop", *PATIENT)
    )
    assert code == 0, complaints
    assert manifest_of(file).quiesced
    assert_thawed(vm)


def test_one_that_is_paused_is_refused_at_once(vm: GuestVm, tmp_path: Path) -> None:
    qmp_execute(tmp_path / "second", "stop")
    with pytest.raises(RefusedError, match="it is paused, so its agent does not run"):
        api.take(str(vm.qmp_path), tmp_path / "x.still", quiesce=True).wait(60)
    qmp_execute(tmp_path / "second", "cont")
    assert_thawed(vm)


@pytest.mark.parametrize("fault", ["stopped", "stopped=kill", "disks=kill", "swept=kill"])
def test_a_take_that_fails_leaves_it_thawed(vm: GuestVm, tmp_path: Path, fault: str) -> None:
    code, _output, complaints = finish(
        start_take(vm, tmp_path / "x.still", "--quiesce", *PATIENT, fault=fault)
    )
    assert code == (-9 if fault.endswith("kill") else 70), complaints
    assert_thawed(vm)


def asked(vm: RestoredVm, command: str) -> object:
    (path,) = (Path(path) for path in vm.sockets if "qga" in path)
    return agent_execute(path, command)


def test_what_is_restored_or_forked_is_thawed(vm: GuestVm, tmp_path: Path, places: Path) -> None:
    file = tmp_path / "x.still"
    taken = api.take(str(vm.qmp_path), file, quiesce=True, max_drain_ms=PATIENT_MS).wait(120)
    assert any("frozen in it" in note for note in taken.notes)
    assert manifest_of(file).quiesced
    for other in (api.restore(file), *api.fork(file, 1), api.restore(file, stream=True)):
        line = console(other)
        # One that is frozen stays so; one that waits for pages takes a while.
        wait_until(lambda line=line: line.command("write") == "write ok", within_s=60.0)
        line.close()
        assert asked(other, "guest-fsfreeze-status") == "thawed"
        assert not any("frozen" in note for note in other.notes)
        other.kill()


def test_what_could_not_be_thawed_is_said(
    vm: GuestVm, tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "_THAW_S", 600.0)  # which is not waited for
    file = tmp_path / "x.still"
    api.take(str(vm.qmp_path), file, quiesce=True, max_drain_ms=PATIENT_MS).wait(120)
    paused = api.restore(file, paused=True)
    assert any("have its guest agent thaw them once it runs" in note for note in paused.notes)
    qmp_execute(Path(paused.qmp_address), "cont")
    again = tmp_path / "again.still"
    api.take(paused.pid, again).wait(120)
    assert manifest_of(again).quiesced  # it has never been thawed
    paused.kill()
    thawed = api.restore(again)
    line = console(thawed)
    wait_until(lambda: line.command("write") == "write ok", within_s=60.0)
    line.close()
    thawed.kill()
    deaf = api.restore(file, extra_args=["-chardev", "null,id=qga0"])
    assert any("does not thaw them" in n and "its channel is null" in n for n in deaf.notes)
    assert deaf.notes == next(one for one in list_restored() if one.pid == deaf.pid).notes
    line = console(deaf)
    assert line.command("write") == "write held"
    line.close()


def test_kill_9_while_the_guest_runs_frozen(vm: GuestVm, tmp_path: Path) -> None:
    """Somebody else has let it run, while the take hangs just after the stop."""
    monitor = tmp_path / "second"
    process = start_take(vm, tmp_path / "x.still", "--quiesce", *PATIENT, fault="stopped=hang")

    def stopped() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(qmp_execute(monitor, "query-status")["status"] == "paused")

    try:
        wait_until(stopped)
        qmp_execute(monitor, "cont")
        assert vm.command("write") == "write held"
    finally:
        process.kill()
        finish(process)
    assert_thawed(vm)
