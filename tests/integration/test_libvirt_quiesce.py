"""``--quiesce`` of a domain: its agent is libvirt's, which passes our commands on."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.domain import GuestDomain, ensure_libvirtd, virsh
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import MachineError
from stillframe.restore.restored import list_restored
from stillframe.store import open_snapshot
from tests.support.probes import has_guest_agent, has_libvirt, has_uffd_wp
from tests.support.taking import PATIENT, PATIENT_MS, finish, start_take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

STATUS = "guest-fsfreeze-status"


@pytest.fixture(scope="module")
def domain() -> Iterator[GuestDomain]:
    has_libvirt().require()
    has_guest_agent().require()
    has_uffd_wp().require()
    with GuestDomain(agent=True) as guest:
        guest.wait_agent()
        yield guest


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For snapshots, where QEMU's user gets to their disks; the records are the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    with tempfile.TemporaryDirectory(prefix="sf-quiesce-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)
        for vm in list_restored():
            if vm.domain is not None:
                vm.kill()


def assert_thawed(domain: GuestDomain) -> None:
    """Soon, since the guard of a take that is dead needs a moment."""

    def thawed() -> bool:
        try:
            return bool(domain.ask_agent(STATUS, timeout_s=10) == "thawed")
        except MachineError:
            return False

    wait_until(thawed, within_s=60.0)
    wait_until(lambda: domain.console.command("write") == "write ok", within_s=60.0)
    assert domain.is_progressing()


def test_a_domain_that_is_restored_is_thawed(domain: GuestDomain, place: Path) -> None:
    file = place / "x.still"
    taken = api.take(domain.name, file, quiesce=True, max_drain_ms=PATIENT_MS).wait(120)
    assert any("frozen in it" in note for note in taken.notes)
    assert_thawed(domain)
    with open_snapshot(file) as snapshot:
        assert snapshot.manifest.quiesced
    other = api.restore_domain(file, name=f"{domain.name}-back")
    console = SerialConsole(next(Path(other.directory).glob("serial-*.sock")))
    try:
        # One that is frozen stays so; one that waits for pages takes a while.
        wait_until(lambda: console.command("write") == "write ok", within_s=60.0)
    finally:
        console.close()
    assert f'"{"thawed"}"' in virsh("qemu-agent-command", other.name, f'{{"execute":"{STATUS}"}}')
    assert not any("frozen" in note for note in other.notes)


@pytest.mark.parametrize("fault", ["stopped", "stopped=kill", "disks=kill"])
def test_a_take_that_fails_leaves_it_thawed(domain: GuestDomain, place: Path, fault: str) -> None:
    code, _output, complaints = finish(
        start_take(domain, place / "x.still", "--quiesce", *PATIENT, fault=fault)
    )
    assert code == (-9 if fault.endswith("kill") else 70), complaints
    assert_thawed(domain)


def test_it_is_thawed_when_libvirtd_dies_with_us(domain: GuestDomain, place: Path) -> None:
    process = start_take(domain, place / "x.still", "--quiesce", *PATIENT, fault="stopped=hang")
    wait_until(lambda: process.poll() is not None or domain.state() == "paused", within_s=60.0)
    assert process.poll() is None, process.communicate()
    pid = int(subprocess.run(["pidof", "-s", "libvirtd"], capture_output=True, check=True).stdout)
    os.kill(pid, signal.SIGKILL)
    process.kill()
    finish(process)
    try:
        wait_until(lambda: domain.console.command("write") == "write ok", within_s=60.0)
    finally:
        ensure_libvirtd()
    domain.wait_agent()
    assert_thawed(domain)
