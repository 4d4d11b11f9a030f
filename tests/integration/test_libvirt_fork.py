"""Clones of a domain of a real libvirtd, as domains."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.domain import GuestDomain, virsh
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import MachineError, UsageError
from stillframe.restore import fork_domains
from stillframe.restore.restored import RestoredVm, list_restored
from stillframe.still.host_mark import state_directory
from tests.integration.cli.program import run
from tests.support.journal_domain import assert_writes_on, journal_domain
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SLOW_MS = 60_000.0
"""A loaded host's disk is not what is tested."""


@pytest.fixture(scope="module")
def domain() -> Iterator[GuestDomain]:
    """Its journal writes to two disks."""
    has_libvirt().require()
    has_linux_guest().require()
    has_uffd_wp().require()
    place = Path(tempfile.mkdtemp(prefix="sf-libvirt-fork-", dir="/var/tmp"))
    place.chmod(0o711)
    try:
        with journal_domain(place) as guest:
            assert_writes_on(guest)
            yield guest
    finally:
        shutil.rmtree(place)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where libvirt's QEMU may read."""
    made = Path(tempfile.mkdtemp(prefix="sf-libvirt-fork-", dir="/var/tmp"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> Iterator[None]:
    """The records are a test's own, and so is the state: QEMU's user gets to it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    tmp_path.chmod(0o700)
    yield
    for vm in list_restored():
        vm.kill()
    assert not list((state_directory() / "restored").glob("*"))


def assert_goes_on(vm: RestoredVm) -> None:
    """It runs, and finds on its disks what its memory says."""
    assert vm.disk_directory is not None
    console = SerialConsole(next(Path(vm.disk_directory).glob("serial-*.sock")))
    try:
        assert console.is_progressing()
        assert not any("journal FAILED" in line for line in console.lines())
    finally:
        console.close()


def test_clones_of_a_running_domain(domain: GuestDomain, place: Path) -> None:
    clones = api.fork(domain.name, 2, name=f"{domain.name}-c{{n}}", max_drain_ms=SLOW_MS)
    assert [vm.name for vm in clones] == [f"{domain.name}-c{n}" for n in (1, 2)]
    assert all(vm.domain is not None and vm.image_path is not None for vm in clones)
    uuids = {virsh("domuuid", name).strip() for name in (domain.name, *(v.name for v in clones))}
    assert len(uuids) == 3
    for vm in clones:
        assert_writes_on(domain, name=vm.name)
        assert_goes_on(vm)
    assert_writes_on(domain)
    seen = {entry["name"]: entry for entry in json.loads(run("ps", "--json").stdout)}
    for vm in clones:
        assert seen[vm.name]["restored_from"] == f"{domain.name} (pid {domain.pid})"
    api.kill(clones[0].name)
    assert "no domain" in virsh("domstate", clones[0].name, check=False) or not clones[0].is_running
    assert clones[1].wait_resident(60)
    assert_goes_on(clones[1])
    api.kill(clones[1].name)  # the last one takes along what they had together
    assert_writes_on(domain)


def test_clones_of_a_snapshot(domain: GuestDomain, place: Path) -> None:
    file = place / "x.still"
    api.take(domain.name, file, max_drain_ms=SLOW_MS).wait(120)
    clones = api.fork(file, 2, name="sf-fork-{n}-" + str(os.getpid()), wait=True)
    for vm in clones:
        assert vm.domain is not None
        assert not Path(vm.image_path or "").exists()
        assert_goes_on(vm)
        vm.kill()
    assert file.exists()


def test_one_that_does_not_start_leaves_none(
    domain: GuestDomain, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = fork_domains.start_domain, []

    def fail_the_second(*arguments: object, **options: object) -> object:
        if started:
            raise MachineError("no more", guest_state="none")
        started.append(start(*arguments, **options))  # type: ignore[arg-type]
        return started[0]

    monkeypatch.setattr(fork_domains, "start_domain", fail_the_second)
    with pytest.raises(MachineError, match="no more"):
        api.fork(domain.name, 2, max_drain_ms=SLOW_MS)
    assert not list_restored()
    with pytest.raises(UsageError, match="takes no options"):
        api.fork(domain.name, 2, program="qemu-system-x86_64", max_drain_ms=SLOW_MS)
    assert_writes_on(domain)
