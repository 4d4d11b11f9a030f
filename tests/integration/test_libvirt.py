"""Domains of a real libvirtd: found, looked at, taken, started again."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.consistency import check_pages
from guests.domain import GuestDomain, ensure_libvirtd, virsh
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import BusyError, SnapshotFailed
from stillframe.snapshot import faultpoints
from stillframe.store import open_snapshot
from tests.support.killing import kill_at_random_moments
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp
from tests.support.surveyed import surveyed
from tests.support.taking import command, finish, start_take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu]


@pytest.fixture(scope="module")
def domain() -> Iterator[GuestDomain]:
    has_libvirt().require()
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestDomain(mem_mib=48) as guest:
        yield guest


def _consistent(file: Path) -> bool:
    with open_snapshot(file) as snapshot:
        pages = (page for _, page in snapshot.iter_pages("pc.ram") if page is not None)
        return check_pages(pages).consistent


def test_it_is_listed_as_a_vm_that_can_be_snapshotted(domain: GuestDomain) -> None:
    shown = surveyed(domain.name)
    assert shown.snapshotable is True, shown.reasons
    assert shown.pid == domain.pid


def test_a_snapshot_of_one_instant_and_libvirt_knows_the_truth(
    domain: GuestDomain, tmp_path: Path
) -> None:
    taken = api.take(domain.name, tmp_path / "a.still").wait(120)
    assert taken.statistics.downtime_ms > 0
    assert domain.state() == "running"
    assert domain.is_progressing()
    assert _consistent(tmp_path / "a.still")
    assert "custom monitor" in virsh("dominfo", domain.name)
    with open_snapshot(tmp_path / "a.still") as snapshot:
        machine = snapshot.manifest.machine
    assert machine is not None
    assert machine.domain is not None
    assert f"<name>{domain.name}</name>" in machine.domain.xml


def test_lifecycle_events_are_libvirts_own(domain: GuestDomain, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()  # it writes whole lines to a terminal, and to a pipe at its end
    os.set_blocking(ours, False)
    seen = b""

    def has_seen(word: bytes) -> bool:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 65536)
        return word in seen

    def hears_of_another_event() -> bool:
        words = ["--key", "sf", "--set", f"<seen n='{time.monotonic_ns()}'/>", "--live"]
        virsh("metadata", domain.name, "https://stillframe.test/", *words)
        return has_seen(b"metadata-change")

    watcher = subprocess.Popen(
        ["virsh", "-c", "qemu:///system", "event", domain.name, "--all", "--loop"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    )
    try:
        wait_until(hears_of_another_event)  # it is there
        api.take(domain.name, tmp_path / "b.still").wait(120)
        wait_until(lambda: has_seen(b"Suspended") and has_seen(b"Resumed"), repr(seen))
    finally:
        watcher.kill()
        watcher.wait()
        os.close(ours)
        os.close(theirs)


def test_killed_at_random_moments(domain: GuestDomain, tmp_path: Path) -> None:
    def unharmed() -> None:
        assert domain.state() == "running"

    outcomes = kill_at_random_moments(domain, tmp_path, unharmed, times=6, seed=5)
    assert outcomes["killed"] >= 3
    assert "running" in domain.state()


@pytest.mark.parametrize("point", ["guarded", "stopped", "devices", "protected"])
def test_killed_where_it_hurts_most(domain: GuestDomain, tmp_path: Path, point: str) -> None:
    process = start_take(domain, tmp_path / "c.still", fault=f"{point}=kill")
    assert finish(process)[0] == -signal.SIGKILL
    assert domain.is_progressing()
    assert domain.state() == "running"


def test_the_guest_goes_on_when_libvirtd_dies_with_us(tmp_path: Path) -> None:
    has_libvirt().require()
    with GuestDomain() as guest:
        process = start_take(guest, tmp_path / "d.still", fault="devices=hang")
        _wait_until(lambda: guest.state() == "paused")
        _kill_libvirtd()
        try:
            os.kill(process.pid, signal.SIGKILL)
            finish(process)
            assert guest.is_progressing()
        finally:
            ensure_libvirtd()
        _wait_until(lambda: guest.state() == "running")


def test_somebody_else_resumes_it_meanwhile(
    domain: GuestDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def resume(point: str) -> None:
        if point == "devices" and not reached.is_set():
            reached.set()
            virsh("resume", domain.name)

    monkeypatch.setattr(faultpoints, "reach", resume)
    with pytest.raises(SnapshotFailed, match="one instant"):
        api.take(domain.name, tmp_path / "e.still").wait(120)
    assert reached.is_set()
    assert domain.state() == "running"


def test_a_suspended_domain_stays_suspended(domain: GuestDomain, tmp_path: Path) -> None:
    virsh("suspend", domain.name)
    try:
        api.take(domain.name, tmp_path / "f.still").wait(120)
        assert domain.state() == "paused"
    finally:
        virsh("resume", domain.name)
    assert domain.is_progressing()


def test_a_job_of_libvirt_is_named(tmp_path: Path) -> None:
    has_libvirt().require()
    base, copy = (Path(f"/var/tmp/sf-job-{os.getpid()}-{name}.raw") for name in ("base", "copy"))
    try:
        for path in (base, copy):
            with path.open("wb") as file:
                file.truncate(64 << 20)
        disk = (
            f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
            f"<source file='{base}'/><target dev='vda' bus='virtio'/></disk>"
        )
        with GuestDomain(extra_devices=disk) as guest:
            virsh(
                *f"blockcopy {guest.name} vda {copy} --format raw --transient-job".split(),
                "--reuse-external",
            )
            with pytest.raises(BusyError, match="libvirt"):
                api.take(guest.name, tmp_path / "g.still").wait(120)
            virsh("blockjob", guest.name, "vda", "--abort")
            assert guest.is_progressing()
    finally:
        base.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


def test_virsh_restores_the_export(tmp_path: Path) -> None:
    has_libvirt().require()
    image = Path(f"/var/tmp/sf-export-{os.getpid()}.save")
    try:
        with GuestDomain() as guest:
            api.take(guest.name, tmp_path / "i.still").wait(120)
            words = command("export", str(tmp_path / "i.still"), "--format", "libvirt")
            subprocess.run([*words, "-o", str(image), "-q"], check=True)
            virsh("destroy", guest.name)
            guest.console.close()
            virsh("restore", str(image))
            console = SerialConsole(guest.directory / "serial.sock")
            try:
                assert console.wait_tick(60).n > 1
            finally:
                console.close()
            assert guest.state() == "running"
    finally:
        image.unlink(missing_ok=True)


def _wait_until(condition: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():  # type: ignore[operator]
                return
        except subprocess.CalledProcessError:
            pass
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.05)


def _kill_libvirtd() -> None:
    pid = int(subprocess.run(["pidof", "-s", "libvirtd"], capture_output=True, check=True).stdout)
    os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not Path(f"/proc/{pid}").exists())
