"""Domains of a real libvirtd that run before their RAM is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.domain import GuestDomain, virsh
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import DataError, HostError
from stillframe.image.filling import Filling
from stillframe.restore import domain_image
from stillframe.restore.restore_domain import RestoredDomain
from stillframe.restore.restored import find_restored, list_restored
from stillframe.store import open_snapshot
from tests.integration.cli.program import run
from tests.support.image_killing import filler_processes, kill_filler
from tests.support.image_vm import PAGE, read_waiting
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

LONG_S = 60.0


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Path]:
    """Of a domain that runs on."""
    has_libvirt().require()
    has_linux_guest().require()
    has_uffd_wp().require()
    directory = Path(tempfile.mkdtemp(prefix="sf-libvirt-image-", dir="/var/tmp"))
    directory.chmod(0o711)
    with GuestDomain(mem_mib=48) as guest:
        api.take(guest.name, directory / "x.still").wait(120)
        yield directory / "x.still"
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The records are a test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)

    def images() -> set[Path]:
        return set(domain_image.SHARED_MEMORY.glob("stillframe-image-*"))

    before = images()
    yield
    for vm in list_restored():
        if vm.domain is not None:
            vm.kill()
    wait_until(lambda: images() <= before)  # whoever filled one may be about to remove it


def goes_on(domain: RestoredDomain) -> bool:
    console = SerialConsole(next(Path(domain.directory).glob("serial-*.sock")))
    try:
        return console.is_progressing()
    finally:
        console.close()


def wrong_pages(domain: RestoredDomain, snapshot: Path, block: str = "pc.ram") -> list[int]:
    """Pages of a paused domain's RAM that are not the snapshot's."""
    maps = Path(f"/proc/{domain.pid}/maps").read_text().splitlines()
    (line,) = [
        line for line in maps if "stillframe-image" in line and line.split()[2] == "00000000"
    ]
    start, end = (int(text, 16) for text in line.split()[0].split("-"))
    there = read_waiting(domain.pid, start, end - start)
    with open_snapshot(snapshot) as opened:
        return [
            page
            for page, content in opened.iter_pages(block)
            if there[page * PAGE : (page + 1) * PAGE] != (content or bytes(PAGE))
        ]


def test_it_runs_before_its_ram_is_there(snapshot: Path) -> None:
    domain = api.restore_domain(snapshot)
    assert domain.image_path is not None, domain.notes
    assert domain.state == "running"
    assert virsh("domstate", domain.name).strip() == "running"
    assert goes_on(domain)
    wait_until(lambda: not Path(domain.image_path or "").exists())
    assert goes_on(domain)
    virsh("destroy", domain.name)
    wait_until(lambda: not filler_processes(domain.image_path))
    shutil.rmtree(domain.directory)


def test_all_of_its_ram_is_the_snapshots(snapshot: Path) -> None:
    domain = api.restore_domain(snapshot, paused=True)
    assert domain.image_path is not None, domain.notes
    assert virsh("domstate", domain.name).strip() == "paused"
    for pid in filler_processes(domain.image_path):
        kill_filler(pid)
    with contextlib.suppress(Exception):
        Filling.adopt(Path(domain.image_path)).wait(LONG_S)
    assert wrong_pages(domain, snapshot) == []
    virsh("resume", domain.name)
    assert goes_on(domain)


def test_ps_helps_one_whose_fillers_were_killed_and_kill_ends_it(snapshot: Path) -> None:
    domain = api.restore_domain(snapshot)
    assert domain.image_path is not None, domain.notes
    for pid in filler_processes(domain.image_path):
        kill_filler(pid)
    shown = {vm["pid"]: vm for vm in json.loads(run("ps", "--json").stdout)}[domain.pid]
    assert shown["restored_from"] == str(snapshot)
    assert shown["resident"] > 0
    wait_until(lambda: not Path(domain.image_path or "").exists())
    assert goes_on(domain)
    assert (find_restored(domain.name).filled_ms() or 0) > 0
    done = run("kill", domain.name)
    assert done.returncode == 0, done.stderr
    assert domain.name not in virsh("list", "--all", "--name").split()
    assert not Path(domain.directory).exists()


def test_destroyed_while_it_is_filled(snapshot: Path) -> None:
    """Whoever fills ends, and nothing of the image is left."""
    domain = api.restore_domain(snapshot, paused=True)
    assert domain.image_path is not None, domain.notes
    found = filler_processes(domain.image_path)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    virsh("destroy", domain.name)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not filler_processes(domain.image_path))
    assert domain.name not in virsh("list", "--all", "--name").split()
    shutil.rmtree(domain.directory)


def test_libvirt_can_save_and_start_it_again(snapshot: Path) -> None:
    domain = api.restore_domain(snapshot, wait=True)
    assert domain.image_path is not None, domain.notes
    assert domain.resident_ms is not None
    image = snapshot.with_name("again.save")
    virsh("save", domain.name, str(image))
    virsh("restore", str(image))
    try:
        assert virsh("domstate", domain.name).strip() == "running"
        assert goes_on(domain)
    finally:
        virsh("destroy", domain.name)
        shutil.rmtree(domain.directory)


@pytest.mark.parametrize("stream", [False, True])
def test_a_snapshot_of_a_restored_domain_is_restored(snapshot: Path, stream: bool) -> None:
    first = api.restore_domain(snapshot, wait=True)
    again = snapshot.with_name(f"again-{stream}.still")
    api.take(first.name, again).wait(120)
    find_restored(first.name).kill()
    second = api.restore_domain(again, paused=not stream, stream=stream)
    assert (second.image_path is None) == stream, second.notes
    if not stream:
        assert wrong_pages(second, again, "sf.ram") == []
        virsh("resume", second.name)
    assert goes_on(second)


def test_what_fails_is_streamed(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before libvirt is asked, and when its QEMU waits for the stream already."""

    def refuse(*_: object, **__: object) -> None:
        raise HostError("not today")

    for place, name in ((domain_image.ImagePlace, "__init__"), (Filling, "begin")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            domain = api.restore_domain(snapshot)
        assert domain.image_path is None
        assert any("not today" in note for note in domain.notes)
        assert goes_on(domain)


def test_a_damaged_snapshot_starts_nothing(snapshot: Path) -> None:
    """With all of RAM awaited; the domain is ended again, and its directory is gone."""
    bad = snapshot.with_name("bad.still")
    shutil.copyfile(snapshot, bad)
    with open_snapshot(snapshot) as opened:
        runs = opened.index.runs_of_block(opened.block_number("pc.ram"))
        frames = sorted({frame for frame, run in runs if run.kind})
        entry = opened.index.frame(frames[len(frames) // 2])
    with bad.open("r+b") as file:
        file.seek(entry.offset_bytes + entry.stored_bytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    before = set(virsh("list", "--all", "--name").split())
    with pytest.raises(DataError, match="damaged"):
        api.restore_domain(bad, wait=True)
    assert set(virsh("list", "--all", "--name").split()) == before
