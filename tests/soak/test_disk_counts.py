"""Pairs of RAM and disks by the hundred, and kills of takes with disks (``make soak``).

``STILLFRAME_SOAK_COUNT``: how many in all of each.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.domain import GuestDomain
from guests.qemu import GuestVm
from guests.serial import SerialConsole
from stillframe import api
from tests.integration.cli.program import run
from tests.support.disk_killing import kill_takes
from tests.support.journal_domain import (
    assert_writes_on,
    back_up,
    journal_domain,
    wait_nothing_of_ours,
)
from tests.support.journal_vm import (
    assert_writes_on as vm_writes_on,
)
from tests.support.journal_vm import (
    check_images,
    disk_arguments,
    export_stream,
    journal_options,
    make_disks,
    overlays_over,
    take_with_disks,
    torn,
)
from tests.support.killing import kill_at_random_moments
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(5400)]

COUNT = int(os.environ.get("STILLFRAME_SOAK_COUNT", "100"))
FORMS = [(image_format, bus) for image_format in ("raw", "qcow2") for bus in ("blk", "scsi")]
KINDS = ("copy", "overlay")
PLAIN = len(FORMS) * len(KINDS) * 2
OF_LIBVIRT = 2 * 2 * 2
EACH = -(-COUNT // (PLAIN + OF_LIBVIRT))
GuestFactory = Callable[..., GuestVm]


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that libvirt's QEMUs get to."""
    has_libvirt().require()
    has_linux_guest().require()
    directory = Path(tempfile.mkdtemp(prefix="sf-soak-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("iothread", [False, True], ids=["", "iothread"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("image_format", "bus"), FORMS)
def test_restored_pairs(
    linux_guest: GuestFactory,
    tmp_path: Path,
    image_format: str,
    bus: str,
    kind: str,
    iothread: bool,
) -> None:
    disks = make_disks(tmp_path, image_format)
    vm = linux_guest(
        **journal_options(disk_arguments(disks, image_format, bus=bus, iothread=iothread))
    )
    vm_writes_on(vm)
    for number in range(EACH):
        file, stream = tmp_path / f"{number}.still", tmp_path / "stream"
        take_with_disks(vm, file, kind)
        assert torn(file, tmp_path) == []
        check_images(file)
        export_stream(file, stream)
        overlays = overlays_over(file, tmp_path)
        words = disk_arguments(overlays, "qcow2", bus=bus, iothread=iothread)
        words += ["-incoming", f"exec:cat {stream}"]
        restored = linux_guest(**journal_options(words), wait_ready=False)
        vm_writes_on(restored, within_s=60.0)  # its guest compares each block with its memory
        restored.stop()
        assert torn(file, tmp_path) == []
        vm_writes_on(vm, within_s=30.0)
        for path in (stream, file, *overlays):
            path.unlink()
        api.commit(str(vm.qmp_path))
        shutil.rmtree(f"{file}.disks", ignore_errors=True)
    print(f"{image_format} {bus} {kind} {'iothread' * iothread}: {EACH} restored pairs, 0 torn")


@pytest.mark.parametrize("iothread", [False, True], ids=["", "iothread"])
@pytest.mark.parametrize("bus", ["virtio", "scsi"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_restored_pairs_of_libvirt(
    place: Path, image_format: str, bus: str, iothread: bool
) -> None:
    formats = (image_format, image_format)
    with journal_domain(place, formats, bus=bus, iothread=iothread) as domain:
        assert_writes_on(domain)
        for number in range(EACH):
            file = place / f"{number}.still"
            api.take(domain.name, file, max_drain_ms=5000).wait(120)
            assert torn(file, place, block="pc.ram") == []
            done = run("restore", file, "--json")
            assert done.returncode == 0, done.stderr
            _restored_writes_on(domain, json.loads(done.stdout))
            assert torn(file, place, block="pc.ram") == []
            assert_writes_on(domain)
            file.unlink()
            shutil.rmtree(f"{file}.disks")
    print(
        f"libvirt {image_format} {bus} {'iothread' * iothread} copy: {EACH} restored pairs, 0 torn"
    )


def _restored_writes_on(domain: GuestDomain, made: dict[str, str]) -> None:
    console = SerialConsole(Path(made["directory"]) / "serial-serial.sock")
    try:
        assert console.wait_tick(60).n > 1
        assert_writes_on(domain, 20, name=made["name"])
        assert not any("journal FAILED" in line for line in console.lines())
    finally:
        console.close()
        domain.virsh("destroy", made["name"], check=False)
        shutil.rmtree(made["directory"])


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9(linux_guest: GuestFactory, tmp_path: Path, kind: str) -> None:
    disks = make_disks(tmp_path, "qcow2")
    vm = linux_guest(**journal_options(disk_arguments(disks, "qcow2")))
    longest_s = kill_takes(vm, disks, tmp_path, kind, COUNT // 2)
    print(f"plain {kind}: {COUNT // 2} kills with disks, next tick after {longest_s:.2f} s at most")


def test_kill_9_with_libvirt(place: Path) -> None:
    with journal_domain(place) as domain:
        assert_writes_on(domain)
        out = place / "out"
        out.mkdir()

        def unharmed() -> None:
            assert domain.state() == "running"
            wait_nothing_of_ours(domain)
            assert_writes_on(domain)

        words = ("--max-drain", "10000")
        outcomes = kill_at_random_moments(domain, out, unharmed, times=COUNT, seed=9, words=words)
        print(f"libvirt: {dict(outcomes)} with disks, the guest unharmed")
        for target in back_up(domain, place):
            target.unlink()
        snapshot = ("--no-metadata", "--disk-only", "--atomic")
        domain.virsh("snapshot-create", domain.name, *snapshot)
        assert_writes_on(domain)
