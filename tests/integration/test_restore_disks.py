"""Restored on the disks of the instant, while the source goes on writing to its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.monitor import qmp_execute
from guests.qemu import GuestVm
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import DataError, NotFoundError, RefusedError
from stillframe.restore.start import RestoredVm
from tests.support.bare_vm import BareVm
from tests.support.journal_vm import (
    assert_writes_on,
    captured_path,
    disk_arguments,
    journal_options,
    make_disks,
    manifest_of,
    qemu_img,
    take_with_disks,
)
from tests.support.probes import has_uffd_wp
from tests.support.restoring import Restores, hmp
from tests.support.taking import PATIENT_MS

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

GuestFactory = Callable[..., GuestVm]
SIZE = 8 << 20
AS_NOW = "as they are now"


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


@pytest.fixture
def restores(tmp_path: Path) -> Iterator[Restores]:
    made = Restores(tmp_path)
    yield made
    made.close()


def _drives(disks: list[Path]) -> list[str]:
    return disk_arguments(disks, "qcow2", bus="scsi")


def _without_names(disks: list[Path]) -> list[str]:
    return [w for d in disks for w in ("-drive", f"file={d},if=virtio,format=qcow2")]


def _chains(disks: list[Path]) -> list[str]:
    words = ["-object", "throttle-group,id=tg,x-iops-total=100000"]
    for number, disk in enumerate(disks):
        words += ["-blockdev", f"file,node-name=f{number},filename={disk}"]
        words += ["-blockdev", f"qcow2,node-name=q{number},file=f{number}"]
        top = f"q{number}"
        if number:
            words += ["-blockdev", "throttle,node-name=top,throttle-group=tg,file=q1"]
            top = "top"
        words += ["-device", f"virtio-blk-pci,drive={top}"]
    return words


@pytest.mark.parametrize("kind", ["copy", "overlay"])
@pytest.mark.parametrize("words", [_drives, _without_names, _chains])
def test_the_guest_finds_its_disks(
    linux_guest: GuestFactory, restores: Restores, tmp_path: Path, kind: str, words: Any
) -> None:
    """The guest reads each block back and compares it with its memory, in source and restored."""
    vm = linux_guest(**journal_options(words(make_disks(tmp_path, "qcow2"))))
    assert_writes_on(vm)
    file = tmp_path / "x.still"
    take_with_disks(vm, file, kind)
    assert_writes_on(vm)
    again = restores.restore(file)
    assert not any(AS_NOW in note for note in again.notes)
    assert len([note for note in again.notes if "as it was at the instant" in note]) == 2
    console = SerialConsole(Path(next(path for path in again.sockets if "serial" in path)))
    try:
        before, deadline = _writes(again), time.monotonic() + 180
        while _writes(again) < before + 40:
            assert time.monotonic() < deadline, "the restored guest does not write"
            time.sleep(0.1)
        assert not any("journal FAILED" in line for line in console.lines())
    finally:
        console.close()
    assert_writes_on(vm)


def _writes(vm: RestoredVm) -> int:
    stats: Any = qmp_execute(Path(vm.qmp_address), "query-blockstats", {})
    return sum(entry["stats"]["wr_operations"] for entry in stats)


FORMS = {
    "hda": ["-hda", "disk.raw"],
    "bare name": ["disk.raw"],
    "hdb": ["-hdb", "disk.raw"],
    "if=virtio": ["-drive", "file=disk.raw,if=virtio,format=raw"],
    "ide index": ["-drive", "file=disk.raw,index=2,format=raw"],
    "scsi": ["-device", "lsi53c895a", "-drive", "file=disk.raw,if=none,format=raw,id=a",
             "-device", "scsi-hd,drive=a"],
    "snapshot=on": ["-drive", "file=disk.raw,if=virtio,format=raw,snapshot=on"],
    "whole VM": ["-snapshot", "-drive", "file=disk.raw,if=virtio,format=raw"],
    "offset": ["-blockdev", "raw,node-name=r,offset=1048576,file.driver=file,"
               "file.filename=disk.raw", "-device", "virtio-blk-pci,drive=r"],
    "offset by drive": ["-drive", "driver=raw,offset=1048576,if=virtio,file.filename=disk.raw"],
    "named by device": ["-blockdev", "raw,node-name=r,file.driver=file,file.filename=disk.raw",
                        "-device", "virtio-blk-pci,drive=r,id=disk"],
    "luks": ["-object", "secret,id=key,data=geheim", "-drive",
             "driver=luks,key-secret=key,if=virtio,file.filename=disk.luks"],
    "luks node": ["-object", "secret,id=key,data=geheim", "-blockdev",
                  "luks,node-name=l,key-secret=key,file.driver=file,file.filename=disk.luks",
                  "-device", "virtio-blk-pci,drive=l"],
}  # fmt: skip
ONLY_COPIED = ("snapshot=on", "whole VM", "luks", "luks node")


def _disk(directory: Path, form: str = "") -> None:
    (directory / "disk.raw").write_bytes(os.urandom(SIZE))
    if "luks" in form:
        words = [
            "--object",
            "secret,id=key,data=geheim",
            "-o",
            "key-secret=key,iter-time=10,hash-alg=sha512",
        ]
        files = [directory / "disk.raw", directory / "disk.luks"]
        qemu_img("convert", "-f", "raw", "-O", "luks", *words, *files)


def _start_of(image: Path | str) -> bytes:
    """What a guest reads at the start of a disk that is a qcow2 image."""
    key = ("--object", "secret,id=key,data=geheim")
    options = f"driver=qcow2,force-share=on,file.driver=file,file.filename={image}"
    raw = Path(f"{image}.raw")
    qemu_img("convert", *key, "--image-opts", "-O", "raw", options, raw)
    return raw.read_bytes()[:512]


def _overlay(vm: RestoredVm) -> str:
    assert vm.disk_directory is not None
    return f"{vm.disk_directory}/disk0.qcow2"


def _scribble(vm: RestoredVm | BareVm, pattern: str = "0x5a") -> None:
    hmp(vm, f'qemu-io {_drive(vm)} "write -P {pattern} 0 4096"')
    hmp(vm, f'qemu-io {_drive(vm)} "flush"')


def _drive(vm: RestoredVm | BareVm) -> str:
    """How HMP calls the only disk with a medium."""
    address = vm.qmp_address if isinstance(vm, RestoredVm) else vm.qmp
    blocks: Any = qmp_execute(Path(address), "query-block", {})
    (block,) = [b for b in blocks if "inserted" in b]
    return block["device"] or f"-d {block['qdev']}"


CASES = [
    (form, kind)
    for form in FORMS
    for kind in ("copy", "overlay")
    if kind == "copy" or form not in ONLY_COPIED
]


@pytest.mark.parametrize(("form", "kind"), CASES)
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_every_form_of_a_disk(
    restores: Restores, tmp_path: Path, form: str, kind: Any, machine: str
) -> None:
    """The source writes on after the instant, and the restored VM sees what was before."""
    _disk(tmp_path, form)
    words = ["-nodefaults", "-M", machine, "-m", "16", *FORMS[form]]
    with BareVm(*words, cwd=tmp_path) as vm:
        at = 1 << 20 if "offset" in form else 0
        was = (tmp_path / "disk.raw").read_bytes()[at : at + 512]
        file = tmp_path / "x.still"
        api.take(vm.qmp, file, disks=kind, max_drain_ms=PATIENT_MS).wait(60)
        _scribble(vm)
        again = restores.restore(file, verify_disks=True)
        assert not any(AS_NOW in note or "is lost" in note for note in again.notes), again.notes
        assert _start_of(_overlay(again)) == was
        _scribble(again)
        assert _start_of(_overlay(again)) == bytes([0x5A] * 512)
        assert _start_of(_overlay(restores.restore(file))) == was


def test_a_second_snapshot_of_a_vm_on_overlays(restores: Restores, tmp_path: Path) -> None:
    """Its nodes and files have other names by then than on its command line."""
    _disk(tmp_path)
    words = ["-nodefaults", "-M", "q35", "-m", "16", *FORMS["named by device"]]
    with BareVm(*words, cwd=tmp_path) as vm:
        api.take(vm.qmp, tmp_path / "one.still", disks="overlay", max_drain_ms=PATIENT_MS).wait(60)
        _scribble(vm)
        for kind in ("overlay", "copy"):
            file = tmp_path / f"{kind}.still"
            api.take(vm.qmp, file, disks=kind, max_drain_ms=PATIENT_MS).wait(60)  # type: ignore[arg-type]
        _scribble(vm, "0x33")
        for kind in ("overlay", "copy"):
            again = restores.restore(tmp_path / f"{kind}.still")
            assert _start_of(_overlay(again)) == bytes([0x5A] * 512)
        first = restores.restore(tmp_path / "one.still")
        assert _start_of(_overlay(first)) == (tmp_path / "disk.raw").read_bytes()[:512]


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A snapshot with a copied disk; the VM has ended and its own disk is gone."""
    _disk(tmp_path)
    words = ["-nodefaults", "-M", "q35", "-m", "16", *FORMS["if=virtio"]]
    with BareVm(*words, cwd=tmp_path) as vm:
        api.take(vm.qmp, tmp_path / "x.still", max_drain_ms=PATIENT_MS).wait(60)
    (tmp_path / "disk.raw").unlink()
    return tmp_path / "x.still"


def _copy_of(file: Path) -> Path:
    return captured_path(file, manifest_of(file).captured_disks[0])


def test_the_dry_run_says_which_disks(taken: Path) -> None:
    plan = api.plan_restore(taken)
    assert [(o.base, o.captured) for o in plan.overlays] == [(str(_copy_of(taken)), "virtio0")]
    assert any(str(_copy_of(taken)) in line for line in api.plan_lines(plan))
    assert not any("disk.raw" in touch.target for touch in plan.touches)


def test_a_missing_copy_is_named(restores: Restores, taken: Path) -> None:
    copy = _copy_of(taken)
    copy.unlink()
    with pytest.raises(NotFoundError, match=copy.name):
        restores.restore(taken)


def test_a_changed_copy_is_named(restores: Restores, taken: Path) -> None:
    copy = _copy_of(taken)
    with copy.open("r+b") as file:
        file.seek(2 << 20)
        file.write(os.urandom(4096))
    with pytest.raises(DataError, match=copy.name):
        restores.restore(taken, verify_disks=True)
    with copy.open("r+b") as file:
        file.write(bytes(4))
    with pytest.raises(DataError, match=copy.name):
        restores.restore(taken)


def test_ones_own_disk_takes_the_place_of_a_missing_copy(restores: Restores, taken: Path) -> None:
    _copy_of(taken).unlink()
    own = taken.with_name("own.raw")
    own.write_bytes(bytes(SIZE))
    again = restores.restore(taken, "-drive", f"file={own},if=virtio,format=raw")
    assert any("is not used" in note for note in again.notes)


def test_without_disks_says_so(restores: Restores, tmp_path: Path) -> None:
    _disk(tmp_path)
    words = ["-nodefaults", "-M", "q35", "-m", "16", *FORMS["if=virtio"]]
    with BareVm(*words, cwd=tmp_path) as vm:
        api.take(vm.qmp, tmp_path / "x.still", disks="none").wait(60)
    assert any(AS_NOW in note for note in restores.restore(tmp_path / "x.still").notes)


def test_a_disk_that_no_option_is_known_to_be_of(restores: Restores, tmp_path: Path) -> None:
    """Plugged in by hand, and not written down: it is not left out silently."""
    _disk(tmp_path)
    with BareVm("-nodefaults", "-M", "q35", "-m", "16", cwd=tmp_path) as vm:
        hmp(vm, "drive_add 0 if=none,id=late,format=raw,file=disk.raw")
        hmp(vm, "device_add virtio-blk-pci,drive=late,id=latedev")
        api.take(vm.qmp, tmp_path / "x.still", max_drain_ms=PATIENT_MS).wait(60)
    plan = api.plan_restore(tmp_path / "x.still")
    placed = [overlay.captured for overlay in plan.overlays]
    if placed != ["late"]:
        with pytest.raises(RefusedError, match="late"):
            restores.restore(tmp_path / "x.still")
