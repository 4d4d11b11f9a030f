"""Domains of a real libvirtd with disks: taken with them, and started again as new domains."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.domain import GuestDomain, virsh
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import RefusedError
from stillframe.restore import adoption
from tests.integration.cli.program import run
from tests.support.journal_domain import (
    assert_writes_on,
    back_up,
    journal_domain,
    wait_nothing_of_ours,
)
from tests.support.journal_vm import (
    captured_path,
    check_images,
    digest,
    manifest_of,
    qemu_img,
    torn,
)
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp
from tests.support.restoring import edited
from tests.support.taking import finish, start_take

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that libvirt's QEMUs get to."""
    directory = Path(tempfile.mkdtemp(prefix="sf-libvirt-disks-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def stillframe(*words: object) -> subprocess.CompletedProcess[str]:
    done = run(*words)
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


@pytest.fixture(scope="module")
def domain(place: Path) -> Iterator[GuestDomain]:
    """With the journal guest, on a raw and a qcow2 disk."""
    has_libvirt().require()
    has_linux_guest().require()
    has_uffd_wp().require()
    with journal_domain(place) as guest:
        assert_writes_on(guest)
        yield guest


@pytest.fixture(scope="module")
def taken(domain: GuestDomain, place: Path) -> Path:
    file = place / "taken.still"
    outcome = stillframe("take", domain.name, "-o", file, "--max-drain", "5000")
    assert outcome.returncode == 0, outcome.stderr
    return file


def test_ram_and_disks_show_one_instant(domain: GuestDomain, taken: Path, place: Path) -> None:
    assert torn(taken, place, block="pc.ram") == []
    check_images(taken)
    wait_nothing_of_ours(domain)
    assert domain.state() == "running"
    assert_writes_on(domain)


def test_an_overlay_is_refused_by_name(domain: GuestDomain, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="managed-disks"):
        api.take(domain.name, tmp_path / "x.still", disks="overlay").wait(60)
    wait_nothing_of_ours(domain)
    outcome = stillframe("take", domain.name, "-o", tmp_path / "x.still", "--disks", "overlay")
    assert outcome.returncode == 3
    assert "--disks copy" in outcome.stderr


def test_a_libvirt_that_cannot_revert_is_refused_by_name(
    domain: GuestDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_OLDEST", 99_000_000)  # whatever libvirt there is
    with pytest.raises(RefusedError, match=r"libvirt-too-old.*restore --revert"):
        api.take(domain.name, tmp_path / "x.still", libvirt_snapshot="x").wait(60)
    assert not (tmp_path / "x.still").exists()


@pytest.mark.parametrize("point", ["stopped", "devices", "protected"])
def test_killed_with_copies_under_way(domain: GuestDomain, place: Path, point: str) -> None:
    process = start_take(
        domain, place / "killed.still", "--max-drain", "5000", fault=f"{point}=kill"
    )
    assert finish(process)[0] == -signal.SIGKILL
    assert_writes_on(domain)
    assert domain.state() == "running"
    wait_nothing_of_ours(domain)
    assert not (place / "killed.still").exists()


def test_libvirts_own_backup_works_afterwards(domain: GuestDomain, taken: Path) -> None:
    for target in back_up(domain, taken.parent):
        qemu_img("check", "-q", target)
    assert_writes_on(domain)


def test_a_job_of_libvirt_is_named_and_its_remedy_helps(domain: GuestDomain, place: Path) -> None:
    nbd = place / "nbd"
    nbd.mkdir()
    nbd.chmod(0o777)  # QEMU, which is another user, listens there
    backup = place / "pull.xml"
    server = f"<server transport='unix' socket='{nbd}/socket'/>"
    backup.write_text(f"<domainbackup mode='pull'>{server}</domainbackup>")
    domain.virsh("backup-begin", domain.name, str(backup))
    try:
        outcome = stillframe("take", domain.name, "-o", place / "busy.still")
        assert outcome.returncode == 4
        assert "libvirt-job" in outcome.stderr
        assert "backup" in outcome.stderr
        checked = stillframe("doctor", domain.name)
        assert checked.returncode == 3
        assert (remedy := f"virsh domjobinfo {domain.name}") in checked.stdout
        assert remedy in outcome.stderr
        assert "Backup" in domain.virsh("domjobinfo", domain.name)
    finally:
        domain.virsh("domjobabort", domain.name)
    deadline = time.monotonic() + 60
    while "None" not in domain.virsh("domjobinfo", domain.name):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    api.take(domain.name, place / "busy.still", disks="none").wait(120)
    assert "libvirt-job" not in stillframe("doctor", domain.name).stdout


def test_a_new_domain_on_the_disks_of_the_instant(
    domain: GuestDomain, taken: Path, tmp_path: Path
) -> None:
    """Its guest reads each block back and compares it with its memory; the first one writes on."""
    copies = [captured_path(taken, disk) for disk in manifest_of(taken).captured_disks]
    before = [digest(copy) for copy in copies]
    outcome = stillframe("restore", taken, "--verify-disks", "--json")
    assert outcome.returncode == 0, outcome.stderr
    made = json.loads(outcome.stdout)
    try:
        assert made["name"].startswith(domain.name)
        assert made["state"] == "running"
        assert Path(f"/proc/{made['pid']}").exists()
        assert sum("as it was at the instant" in note for note in made["notes"]) == 2
        assert not any("as they are now" in note for note in made["notes"])
        assert made["uuid"] in virsh("domuuid", made["name"])
        assert "Persistent:" in virsh("dominfo", made["name"])
        console = SerialConsole(Path(made["directory"]) / "serial-serial.sock")
        try:
            # A guest that had booted anew would begin to count again.
            assert console.wait_tick(60).n > 1
            assert_writes_on(domain, 40, name=made["name"])
            assert not any("journal FAILED" in line for line in console.lines())
        finally:
            console.close()
        assert_writes_on(domain)
    finally:
        virsh("destroy", made["name"], check=False)
        shutil.rmtree(made["directory"])
    assert [digest(copy) for copy in copies] == before


def test_its_name_and_paused(taken: Path) -> None:
    name = f"sf-named-{time.monotonic_ns()}"
    outcome = stillframe("restore", taken, "--name", name, "--paused")
    assert outcome.returncode == 0, outcome.stderr
    try:
        assert name in outcome.stdout
        assert virsh("domstate", name).strip() == "paused"
        again = stillframe("restore", taken, "--name", name)
        assert again.returncode != 0
        assert "already exists" in again.stderr
        assert "Traceback" not in again.stderr
        second = stillframe("restore", taken, "--name", f"{name}-2", "--paused")
        assert second.returncode == 0, second.stderr
    finally:
        virsh("destroy", name, check=False)
        virsh("destroy", f"{name}-2", check=False)


def test_the_dry_run_shows_what_the_xml_touches(domain: GuestDomain, taken: Path) -> None:
    outcome = stillframe("restore", taken, "--dry-run", "--json")
    assert outcome.returncode == 0, outcome.stderr
    plan = json.loads(outcome.stdout)
    touched = {touch["target"] for touch in plan["touches"]}
    assert f"{domain.directory}/kernel" in touched
    assert any("qemu-system" in target for target in touched)
    assert plan["needs_trust"] == []
    assert {overlay["captured"] for overlay in plan["overlays"]} > set()
    assert not Path(plan["directory"]).exists()
    text = stillframe("restore", taken, "--dry-run").stdout
    assert "<domain" in text
    assert "it touches" in text


@pytest.mark.parametrize(
    "words",
    [["--qmp", "/tmp/x"], ["--program", "kvm"], ["--", "-m", "1G"], ["--clock", "instant"]],
)
def test_options_that_only_a_qemu_has(taken: Path, words: list[str]) -> None:
    outcome = stillframe("restore", taken, *words)
    assert outcome.returncode == 2
    assert "--as qemu" in outcome.stderr


def test_from_elsewhere_it_needs_trust(taken: Path, tmp_path: Path) -> None:
    foreign = edited(taken, taken.with_name("foreign.still"))
    assert stillframe("restore", foreign, "--revert", "--yes").returncode == 10  # not asked
    before = virsh("list", "--all", "--name")
    outcome = stillframe("restore", foreign)
    assert outcome.returncode == 10
    assert "--dry-run" in outcome.stderr
    assert "needs --trust" in stillframe("restore", foreign, "--dry-run").stdout
    assert virsh("list", "--all", "--name") == before


def test_a_changed_copy_is_refused_by_name(taken: Path) -> None:
    other = taken.parent / "other"
    other.mkdir()
    shutil.copy(taken, other)
    shutil.copytree(f"{taken}.disks", other / f"{taken.name}.disks")
    copy = captured_path(other / taken.name, manifest_of(taken).captured_disks[1])
    with copy.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"x")
    outcome = stillframe("restore", other / taken.name, "--verify-disks")
    assert outcome.returncode != 0
    assert copy.name in outcome.stderr
    copy.unlink()
    outcome = stillframe("restore", other / taken.name)
    assert outcome.returncode != 0
    assert copy.name in outcome.stderr


def _raw(path: Path, mib: int) -> Path:
    with path.open("wb") as file:
        file.truncate(mib << 20)
    path.chmod(0o666)
    return path


def _disk(path: Path, target: str, bus: str, kind: str = "disk", more: str = "") -> str:
    what = f"<driver name='qemu' type='raw'/><source file='{path}'/>"
    what += f"<target dev='{target}' bus='{bus}'/>{more}"
    return f"<disk type='file' device='{kind}'>{what}</disk>"


def test_a_cd_a_read_only_disk_and_one_that_was_plugged_in(place: Path) -> None:
    """What the guest may write is copied; the rest is used as it is."""
    written, plugged = _raw(place / "written.raw", 8), _raw(place / "plugged.raw", 4)
    disc, shared = _raw(place / "disc.iso", 1), _raw(place / "shared.raw", 2)
    xml = _disk(written, "vda", "virtio") + _disk(disc, "sda", "sata", "cdrom", "<readonly/>")
    xml += _disk(shared, "vdb", "virtio", more="<readonly/>")
    xml += "<controller type='pci' index='0' model='pcie-root'/>"
    xml += "".join(
        f"<controller type='pci' index='{number}' model='pcie-root-port'/>"
        for number in range(1, 13)  # some to plug into
    )
    file = place / "mixed.still"
    with GuestDomain(extra_devices=xml, disks=True, mem_mib=8, rate_mib_per_s=2) as guest:
        guest.virsh("attach-disk", guest.name, str(plugged), "vdc", "--subdriver", "raw")
        taken = api.take(guest.name, file).wait(120)
        assert not any("changed at about the instant" in note for note in taken.notes)
        captured = manifest_of(file).captured_disks
        assert sorted(disk.virtual_size_bytes >> 20 for disk in captured) == [4, 8]
        outcome = stillframe("restore", file, "--json")
        assert outcome.returncode == 0, outcome.stderr
        made = json.loads(outcome.stdout)
        try:
            assert made["state"] == "running"
            rows = virsh("domblklist", made["name"]).splitlines()
            used = dict(row.split() for row in rows if row.strip())
            assert {used["sda"], used["vdb"]} == {str(disc), str(shared)}
            assert all(made["directory"] in used[target] for target in ("vda", "vdc"))
            console = SerialConsole(Path(made["directory"]) / "serial-serial.sock")
            try:
                assert console.is_progressing()
            finally:
                console.close()
        finally:
            virsh("destroy", made["name"], check=False)
            shutil.rmtree(made["directory"])
        assert guest.is_progressing()


def test_without_disks_while_the_first_one_writes(domain: GuestDomain, place: Path) -> None:
    file = place / "without.still"
    api.take(domain.name, file, disks="none").wait(120)
    outcome = stillframe("restore", file)
    assert outcome.returncode == 3
    assert "--disks copy" in outcome.stderr
    assert "without disks" in stillframe("show", file).stdout


def test_as_a_plain_qemu(domain: GuestDomain, taken: Path) -> None:
    outcome = stillframe("restore", taken, "--as", "qemu", "--json")
    assert outcome.returncode == 0, outcome.stderr
    made = json.loads(outcome.stdout)
    try:
        assert made["state"] == "running"
        assert sum("as it was at the instant" in note for note in made["notes"]) == 2
    finally:
        subprocess.run(["kill", "-9", str(made["pid"])], check=True)
        shutil.rmtree(made["disk_directory"])


def test_as_a_domain_wants_one(tmp_path: Path, linux_guest: Any) -> None:
    vm = linux_guest()
    api.take(str(vm.qmp_path), tmp_path / "x.still").wait(60)
    for words in (["--as", "domain"], ["--revert", "--yes"]):
        outcome = stillframe("restore", tmp_path / "x.still", *words)
        assert outcome.returncode == 2, outcome.stderr
