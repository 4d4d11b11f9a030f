"""Disks: the source's are never opened for writing."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.restore.disk_use import is_written
from tests.unit.restore.recorded import Planner, disk


@pytest.fixture
def image(planner: Planner) -> Path:
    path = planner.directory / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def locked(image: Path) -> Iterator[Path]:
    """The image, marked as QEMU marks one that it writes to."""
    fd = os.open(image, os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
    fcntl.fcntl(fd, 37, lock)  # F_OFD_SETLK
    yield image
    os.close(fd)


SHORT = [
    (["-hda", "disk.img"], "index=0,media=disk"),
    (["-hdd", "disk.img"], "index=3,media=disk"),
    (["disk.img"], "index=0,media=disk"),
    (["-fda", "disk.img"], "if=floppy,index=0"),
    (["-pflash", "disk.img"], "if=pflash"),
    (["-sd", "disk.img"], "if=sd"),
    (["-mtdblock", "disk.img"], "if=mtd"),
]


@pytest.mark.parametrize(("argv", "wanted"), SHORT, ids=lambda x: " ".join(x))
def test_short_forms(planner: Planner, image: Path, argv: list[str], wanted: str) -> None:
    words = planner.words(*argv)
    overlay = planner.run / "disk0.qcow2"
    assert words == ["-drive", f"{wanted},file={overlay},format=qcow2"]


def test_a_drive(planner: Planner, image: Path) -> None:
    plan = planner.plan("-drive", f"file={image},if=virtio,format=raw,cache=none,snapshot=on")
    overlay = str(planner.run / "disk0.qcow2")
    assert plan.argv[1:3] == ("-drive", f"if=virtio,cache=none,file={overlay},format=qcow2")
    (entry,) = plan.overlays
    assert (entry.base, entry.base_format, entry.overlay) == (str(image), "raw", overlay)
    assert not entry.in_use
    assert ("run", "qemu-img") in [(t.access, t.target) for t in plan.touches]
    assert any("as they are now" in note for note in plan.notes)


def test_a_disk_in_use(planner: Planner, locked: Path) -> None:
    assert is_written(str(locked))
    plan = planner.plan("-drive", f"file={locked},if=virtio")
    assert plan.argv[2].endswith(",format=qcow2,backing.force-share=on")
    assert plan.overlays[0].in_use
    assert any("being written by another program" in note for note in plan.notes)


def test_a_disk_that_is_not_in_use(image: Path) -> None:
    assert not is_written(str(image))
    assert not is_written("/nowhere/disk")


def test_the_disk_of_the_instant_is_used(planner: Planner, image: Path) -> None:
    """After a blockdev-snapshot-sync the VM writes to another file than it was started with."""
    now = disk("/vm/overlay.qcow2", device="d0")
    plan = planner.plan("-drive", f"file={image},if=virtio,format=raw,id=d0", disks=(now,))
    assert plan.overlays[0].base == "/vm/overlay.qcow2"
    assert plan.overlays[0].base_format == "qcow2"
    assert any("/vm/overlay.qcow2" in note for note in plan.notes)


def test_the_format_of_the_instant_is_used(planner: Planner, image: Path) -> None:
    now = disk(str(image), device="d0", driver="raw")
    plan = planner.plan("-drive", f"file={image},if=virtio,id=d0", disks=(now,))
    assert plan.overlays[0].base_format == "raw"


def test_an_ejected_medium(planner: Planner, image: Path) -> None:
    now = disk("", device="cd0", driver="", removable=True)
    drive = f"file={image},if=none,media=cdrom,format=raw,id=cd0"
    plan = planner.plan("-drive", drive, disks=(now,))
    assert plan.argv[1:3] == ("-drive", "if=none,media=cdrom,id=cd0")


def test_a_medium_that_was_changed_in_a_drive_without_an_id(planner: Planner, image: Path) -> None:
    new = planner.directory / "new.iso"
    new.write_bytes(bytes(4096))
    now = disk(str(new), device="ide2-cd0", driver="raw", removable=True)
    plan = planner.plan("-cdrom", str(image), disks=(now,))
    assert any(f"file={new}" in word for word in plan.argv)
    assert any("at the instant" in note for note in plan.notes)


def test_a_remote_disk(planner: Planner) -> None:
    plan = planner.plan("-drive", "file=nbd://host/name,format=raw,if=virtio")
    assert plan.overlays[0].base == "nbd://host/name"
    assert ("connect", "nbd://host/name") in [(t.access, t.target) for t in plan.touches]


def blockdevs(words: list[str]) -> dict[str, dict[str, Any]]:
    values = [words[n + 1] for n, word in enumerate(words) if word == "-blockdev"]
    found: dict[str, dict[str, Any]] = {}
    for value in values:
        tree = (
            json.loads(value)
            if value.startswith("{")
            else dict(part.split("=", 1) for part in value.split(","))
        )
        found[tree["node-name"]] = tree
    return found


LIBVIRT = [
    "-blockdev",
    '{"driver":"file","filename":"DISK","node-name":"s1","auto-read-only":true,"discard":"unmap"}',
    "-blockdev",
    '{"node-name":"f1","read-only":false,"driver":"qcow2","file":"s1","backing":null}',
    "-device",
    "virtio-blk-pci,drive=f1,id=disk0",
]
PLAIN = [
    "-blockdev",
    "driver=file,filename=DISK,node-name=s1",
    "-blockdev",
    "driver=qcow2,file=s1,node-name=f1",
    "-device",
    "virtio-blk-pci,drive=f1,id=disk0",
]


@pytest.mark.parametrize("argv", [LIBVIRT, PLAIN], ids=["json", "text"])
@pytest.mark.parametrize("in_use", [False, True])
def test_nodes(
    planner: Planner,
    image: Path,
    argv: list[str],
    in_use: bool,
    request: pytest.FixtureRequest,
) -> None:
    if in_use:
        request.getfixturevalue("locked")
    argv = [word.replace("DISK", str(image)) for word in argv]
    plan = planner.plan(*argv)
    assert not plan.refusals
    nodes = blockdevs(list(plan.argv))
    base = nodes["f1"]["backing"]
    assert nodes["f1"]["driver"] == "qcow2"
    assert nodes["f1"]["file"] == {"driver": "file", "filename": str(planner.run / "disk0.qcow2")}
    assert nodes[str(base)]["file"] == "s1"
    for name in (base, "s1"):
        assert nodes[str(name)]["read-only"] in (True, "on")
        assert "auto-read-only" not in nodes[str(name)]
        assert ("force-share" in nodes[str(name)]) == in_use
    assert list(plan.argv).index("-device") > list(plan.argv).index("-blockdev")
    assert plan.overlays[0].base == str(image)
    assert plan.overlays[0].base_format == "qcow2"


def test_a_node_with_its_file_inside(planner: Planner, image: Path) -> None:
    plan = planner.plan(
        "-blockdev", f"driver=raw,node-name=d,file.driver=file,file.filename={image}"
    )
    assert plan.overlays[0].base == str(image)
    assert plan.overlays[0].base_format == "raw"


def test_a_throttled_disk(planner: Planner, image: Path) -> None:
    plan = planner.plan(
        "-blockdev",
        f"driver=file,filename={image},node-name=s",
        "-blockdev",
        "driver=throttle,throttle-group=g,file=s,node-name=t",
    )
    assert not plan.refusals
    assert plan.overlays[0].base_format == "raw"


def test_no_recorded_node_is_written_whatever_refers_to_it(planner: Planner, image: Path) -> None:
    """A group of the same name makes the disk look like a child of a read-only node."""
    plan = planner.plan(
        "-blockdev",
        f"driver=file,filename={image},node-name=s",
        "-blockdev",
        "driver=null-co,node-name=n",
        "-blockdev",
        "driver=throttle,throttle-group=s,file=n,node-name=t,read-only=on",
        "-device",
        "virtio-blk-pci,drive=s",
    )
    nodes = blockdevs(list(plan.argv))
    assert nodes["s"]["driver"] == "qcow2"
    assert nodes[str(nodes["s"]["backing"])]["read-only"] == "on"


READ_ONLY = [
    "driver=file,filename=/x/y.iso,node-name=cd,read-only=on",
    '{"driver":"file","filename":"/x/y.iso","node-name":"cd","read-only":true}',
    "driver=null-co,node-name=n,size=1G",
]


@pytest.mark.parametrize("value", READ_ONLY)
def test_read_only_nodes_are_kept(planner: Planner, value: str) -> None:
    assert planner.words("-blockdev", value) == ["-blockdev", value]


def test_a_disk_that_became_another_is_refused(planner: Planner, image: Path) -> None:
    now = disk("/vm/overlay.qcow2", node_name="d")
    argv = ["-blockdev", f"driver=file,filename={image},node-name=d"]
    plan = planner.plan(*argv, disks=(now,))
    assert "/vm/overlay.qcow2" in plan.refusals[0].reason


def test_nodes_in_a_circle(planner: Planner) -> None:
    argv = ["-blockdev", "driver=raw,file=b,node-name=a"]
    argv += ["-blockdev", "driver=raw,file=a,node-name=b"]
    assert all(word.endswith("read-only=on") for word in planner.words(*argv)[1::2])
    assert planner.plan(*argv, "-device", "ide-hd,drive=a").refusals
