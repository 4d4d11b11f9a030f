"""The session libvirt of another user, a newer one than the distribution's: taken, adopted as a
snapshot of libvirt's own, reverted, exported as a compressed save image."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.domain import GuestDomain
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import RefusedError, SnapshotCancelled, UsageError
from tests.integration.cli.program import answered, run
from tests.support.journal_domain import assert_writes_on, journal_domain
from tests.support.journal_vm import captured_path, digest, manifest_of, torn
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp
from tests.support.session_libvirt import SessionLibvirt
from tests.support.surveyed import surveyed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

NAME = "before-the-upgrade"


@pytest.fixture(scope="module")
def session() -> Iterator[SessionLibvirt]:
    for need in (has_libvirt(), has_linux_guest(), has_uffd_wp()):
        need.require()
    with SessionLibvirt(newer=True) as session:
        yield session


@pytest.fixture(scope="module")
def domain(session: SessionLibvirt) -> Iterator[GuestDomain]:
    """A persistent one with the journal guest, on a raw and a qcow2 disk."""
    with journal_domain(session.work, session=session) as guest:
        assert_writes_on(guest)
        yield guest


@pytest.fixture(scope="module")
def taken(domain: GuestDomain, session: SessionLibvirt) -> Path:
    file = session.work / "taken.still"
    words = ["--libvirt-snapshot", NAME, "--max-drain", "10000", "--json"]
    done = run("take", domain.name, "-o", file, *words)
    assert done.returncode == 0, done.stderr
    assert any(NAME in note for note in json.loads(done.stdout)["notes"])
    return file


@contextlib.contextmanager
def went_back(domain: GuestDomain, taken: Path) -> Iterator[None]:
    """What is done in it brings the guest back to the instant: it counts on from there, on the
    disks of then, and never writes to the snapshot's copies."""
    copies = [captured_path(taken, disk) for disk in manifest_of(taken).captured_disks]
    digests = [digest(copy) for copy in copies]
    late = domain.console.wait_tick().n
    domain.console.close()
    yield
    console = SerialConsole(domain.directory / "serial.sock")
    domain._console = console
    assert 1 < console.wait_tick(60).n < late
    assert domain.state() == "running"
    assert_writes_on(domain, 20)
    assert not any("journal FAILED" in line for line in console.lines())
    assert [digest(copy) for copy in copies] == digests
    while console.wait_tick(60).n < late:  # so that it can go back again
        pass


def test_it_is_of_one_instant(domain: GuestDomain, taken: Path, session: SessionLibvirt) -> None:
    shown = surveyed(domain.name)
    assert shown.snapshotable is True, shown.reasons
    assert torn(taken, session.directory, block="pc.ram") == []
    assert domain.state() == "running"


@pytest.mark.parametrize("how", ["--wait", "--stream"])
def test_a_new_domain_in_that_session(domain: GuestDomain, taken: Path, how: str) -> None:
    done = run("restore", taken, how, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    try:
        assert (made["image_path"] is not None) == (how == "--wait"), made["notes"]
        assert made["uri"] == domain.uri
        console = SerialConsole(Path(made["directory"]) / "serial-serial.sock")
        assert console.wait_tick(60).n > 1
        assert_writes_on(domain, 20, name=made["name"])
        assert not any("journal FAILED" in line for line in console.lines())
        console.close()
    finally:
        domain.virsh("destroy", made["name"], check=False)
        shutil.rmtree(made["directory"], ignore_errors=True)


def test_virsh_lists_it_and_reverts_to_it(domain: GuestDomain, taken: Path) -> None:
    assert NAME in domain.virsh("snapshot-list", domain.name, "--name")
    with pytest.raises(UsageError, match="already"):
        api.take(domain.name, taken.with_name("x.still"), libvirt_snapshot=NAME).wait(120)
    with went_back(domain, taken):
        domain.virsh("snapshot-revert", domain.name, NAME)
    assert f"{taken}.disks/" in domain.virsh("dumpxml", domain.name)


def test_restore_reverts_as_well(domain: GuestDomain, taken: Path) -> None:
    identity, before = domain.virsh("domuuid", domain.name), domain.pid
    refused = run("restore", taken, "--revert")
    assert refused.returncode == 2
    assert b"--yes" in refused.stderr
    question, words = b"What it did since is lost. [y/N]", ("restore", taken, "--revert", "--json")
    for answer in (b"n\n", b"\n", b"\x04"):
        assert answered(question, answer, *words)[0] == SnapshotCancelled.exit_code
    assert domain.pid == before
    with went_back(domain, taken):
        code, out, seen = answered(question, b"y\n", *words)
        assert code == 0, seen
    assert domain.pid != before
    made = json.loads(out)
    assert made["name"] == domain.name
    assert domain.virsh("domuuid", domain.name) == identity
    for words in ((), ("--inactive",)):  # also when it is started anew
        assert made["directory"] in domain.virsh("dumpxml", domain.name, *words)


def test_a_compressed_save_image(domain: GuestDomain, taken: Path, session: SessionLibvirt) -> None:
    """libvirt 10.4 or newer reads the snapshot file itself behind a short head."""
    image = session.work / "image.save"
    done = run("export", taken, "--format", "libvirt-zstd", "-o", image)
    assert done.returncode == 0, done.stderr
    os.chown(image, session.uid, -1)
    xml = session.work / "restored.xml"
    xml.write_text(domain.virsh("dumpxml", domain.name, "--migratable"))
    late = domain.console.wait_tick().n
    domain.virsh("destroy", domain.name)
    domain.console.close()
    domain.virsh("restore", str(image), "--xml", str(xml))
    domain._console = SerialConsole(domain.directory / "serial.sock")
    assert 1 < domain.console.wait_tick(60).n < late


def test_libvirt_deletes_only_what_it_knows(domain: GuestDomain, taken: Path) -> None:
    """Its own deletion folds files into one another; it refuses, and nothing is touched."""
    copies = [captured_path(taken, disk) for disk in manifest_of(taken).captured_disks]
    with pytest.raises(subprocess.CalledProcessError):
        domain.virsh("snapshot-delete", domain.name, NAME)
    domain.virsh("snapshot-delete", domain.name, NAME, "--metadata")
    assert NAME not in domain.virsh("snapshot-list", domain.name, "--name")
    assert all(copy.exists() for copy in copies)


def test_without_disks_there_is_no_way_back(domain: GuestDomain, session: SessionLibvirt) -> None:
    file = session.work / "without.still"
    with pytest.raises(RefusedError, match="not in the snapshot"):
        api.take(domain.name, file, disks="none", libvirt_snapshot="x").wait(120)
    done = run("restore", file, "--revert", "--yes")
    assert done.returncode == 3
    assert b"not in the snapshot" in done.stderr
    assert domain.state() == "running"
