"""Disks that are described at length: an overlay where that is known to be right, else refused."""

from __future__ import annotations

import json

import pytest

from tests.unit.restore.recorded import Planner, disk

NBD = '"server":{"type":"unix","path":"/s"}'
KNOWN = [
    (["-drive", "file=/d,format=qcow2,encrypt.key-secret=s0"],
     'json:{"driver":"qcow2","encrypt":{"key-secret":"s0"},"file":{"driver":"file","filename":"/d"}}'),
    (["-drive", "file=/d,driver=luks,key-secret=s0"],
     'json:{"driver":"luks","key-secret":"s0","file":{"driver":"file","filename":"/d"}}'),
    (["-drive", "driver=qcow2,file.driver=nbd,file.host=h,file.port=10809"],
     'json:{"driver":"qcow2","file":{"driver":"nbd","host":"h","port":"10809"}}'),
    (["-drive", "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=/s"],
     f'json:{{"driver":"raw","file":{{"driver":"nbd",{NBD}}}}}'),
    (["-drive", "file.driver=file,file.filename=/d,format=raw"], "/d"),
    (["-drive", "file.filename=/d,format=raw"], "/d"),
    (["-drive", "file=/d,format=raw,cache.direct=on,l2-cache-size=1M,throttling.iops-total=9"],
     "/d"),
    (["-drive", 'file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/d"}}'], "/d"),
    (["-drive", 'file=json:{"driver":"qcow2",,"file.driver":"file",,"file.filename":"/d"}'], "/d"),
    (["-drive", "file=host_device:/dev/sdx,format=raw"], "/dev/sdx"),
    (["-drive", "file=fat:/home"], "fat:/home"),
    (["-drive", "file=https://h/x.img,format=raw"], "https://h/x.img"),
    (["-drive", "file=nbd+unix:///x?socket=/s,format=raw"], "nbd+unix:///x?socket=/s"),
    (["-blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=/s"],
     f'json:{{"driver":"nbd",{NBD}}}'),
    (["-blockdev", f'{{"driver":"raw","node-name":"n","file":{{"driver":"nbd",{NBD}}}}}'],
     f'json:{{"driver":"raw","file":{{"driver":"nbd",{NBD}}}}}'),
    (["-blockdev", "driver=luks,node-name=n,key-secret=s,file.driver=file,file.filename=/d"],
     'json:{"driver":"luks","key-secret":"s","file":{"driver":"file","filename":"/d"}}'),
    (["-blockdev", "driver=raw,node-name=n,offset=512,size=1M,file.driver=file,file.filename=/d"],
     'json:{"driver":"raw","offset":"512","size":"1M","file":{"driver":"file","filename":"/d"}}'),
    (["-blockdev", "driver=copy-on-read,node-name=n,file.driver=qcow2,file.file.driver=file,"
      "file.file.filename=/d"], "/d"),
    (["-blockdev", "driver=throttle,node-name=n,throttle-group=g,file.driver=raw,"
      "file.file.driver=file,file.file.filename=/d"], "/d"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "base"), KNOWN, ids=lambda w: w if isinstance(w, str) else w[1])
def test_an_overlay_over_it(planner: Planner, argv: list[str], base: str) -> None:
    plan = planner.plan(*argv)
    assert not plan.refusals
    assert [overlay.base for overlay in plan.overlays] == [base]
    assert plan.needs_trust
    assert not planner.plan(*argv, here=True).needs_trust


DEEP = ".".join("a" * 3000)
UNKNOWN = [
    f"driver=raw,node-name=n,{DEEP}=x",
    '{"driver":["x"],"node-name":"n"}',
    '{"driver":"raw","node-name":{"n":1},"file":{"driver":"file","filename":"/d"}}',
    '{"driver":"raw","node-name":"n","file":{"driver":"file","filename":["/d"]}}',
    "driver=blkdebug,node-name=n,image.driver=file,image.filename=/d,config=/c",
    "driver=blklogwrites,node-name=n,file.driver=null-co,log.driver=file,log.filename=/d",
    "driver=quorum,node-name=n,vote-threshold=1,children.0.driver=file,children.0.filename=/d",
    "driver=vvfat,node-name=n,dir=/d,rw=on",
    "driver=nvme,node-name=n,device=0000:01:00.0,namespace=1",
    "driver=file,node-name=n,filename=/d,pr-manager=p",
    "driver=raw,node-name=n,file.driver=blkverify,file.test.driver=file,file.raw.driver=file",
    "driver=qcow2,node-name=n,file.driver=file,file.filename=/d,backing.driver=preallocate",
    "driver=file,node-name=n,filename=/dev/fdset/1",
    "driver=rbd,node-name=n,pool=p,image=i,conf=/etc/x",
    "driver=raw,node-name=n,file=nothing",
    "driver=raw,node-name=n,file=a,file.driver=file",
    '{"driver":"raw","node-name":"n","file.driver":"file","file.filename":"/d"}',
    '{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/d"},'
    '"data-file":{"driver":"copy-before-write","file":{"driver":"file","filename":"/d"}}}',
]


@pytest.mark.parametrize("value", UNKNOWN)
def test_what_is_not_known_is_refused_and_needs_trust(planner: Planner, value: str) -> None:
    plan = planner.plan("-blockdev", value, "-device", "virtio-blk-pci,drive=n")
    assert plan.refusals
    assert plan.needs_trust
    assert not any(word == value for word in plan.argv)


@pytest.mark.parametrize(
    "value",
    [
        "file=blkdebug:/c:/d",
        "file=blkverify:/r:/d",
        "file=fat:rw:/d",
        "file=fat:floppy:rw:/d",
        "file=rbd:p/i:log_file=/d",
        "file=sheepdog:x",
        "file=json:{}",
        "file=json:{",
        "file=json:[]",
        "file=/d,backing.file.filename=/e",
        "file=/d,data-file.driver=blkdebug",
        "file=/d,noreadonly",
        "file=/d,file.driver=blkdebug",
        "file=/d,cache=none,unheard-of=1",
    ],
)
def test_a_drive_that_is_not_known(planner: Planner, value: str) -> None:
    plan = planner.plan("-drive", value)
    assert plan.refusals
    assert plan.needs_trust


def test_an_inner_node_that_a_device_uses_gets_the_overlay(planner: Planner) -> None:
    tree = {
        "driver": "raw",
        "node-name": "top",
        "read-only": True,
        "file": {"driver": "file", "node-name": "q0", "read-only": False, "filename": "/d"},
    }
    argv = ["-blockdev", json.dumps(tree), "-device", "virtio-blk-pci,drive=q0"]
    plan = planner.plan(*argv)
    (recorded, overlay) = (json.loads(plan.argv[2]), json.loads(plan.argv[4]))
    assert recorded["file"]["read-only"] is True
    assert recorded["file"]["node-name"] == overlay["backing"]
    assert overlay["node-name"] == "q0"
    assert plan.overlays[0].base == "/d"


def test_a_backing_node_is_read_only_whatever_it_says(planner: Planner) -> None:
    value = (
        "driver=qcow2,node-name=n,file.driver=file,file.filename=/d,backing.driver=file,"
        "backing.filename=/e,backing.read-only=off,backing.auto-read-only=on"
    )
    plan = planner.plan("-blockdev", value, "-device", "virtio-blk-pci,drive=n")
    assert "backing.read-only=on" in plan.argv[2]
    assert "auto-read-only" not in plan.argv[2]


@pytest.mark.parametrize("how", ["snapshot=on,", "", "id-only"])
def test_a_temporary_overlay_of_the_first_vm_is_not_looked_for(planner: Planner, how: str) -> None:
    """-snapshot: its monitor names a file that has no name."""
    now = disk("/var/tmp/vl.AbC123", device="d0")
    flags = [] if how == "snapshot=on," else ["-snapshot"]
    drive = f"file=/d,{how if how != 'id-only' else ''}if=none,id=d0"
    plan = planner.plan("-drive", drive, *flags, disks=(now,))
    assert plan.overlays[0].base == "/d"


def test_a_cdrom_by_its_address(planner: Planner) -> None:
    plan = planner.plan("-cdrom", "https://example.org/x.iso")
    assert ("connect", "https://example.org/x.iso") in [(t.access, t.target) for t in plan.touches]
    assert planner.words("-cdrom", "https://example.org/x.iso") == [
        "-cdrom",
        "https://example.org/x.iso",
    ]
