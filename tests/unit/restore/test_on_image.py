"""Command lines whose RAM goes on an image."""

from __future__ import annotations

import shlex

import pytest

from stillframe.model import BlockRecord
from stillframe.restore.on_image import map_image, plan_image

MIB = 1 << 20


def _blocks(page: int = 4096, **sizes_mib: int) -> tuple[BlockRecord, ...]:
    names = {name.replace("__", "/").replace("_", "."): size for name, size in sizes_mib.items()}
    return tuple(
        BlockRecord(idstr=name, used_length_bytes=size * MIB, page_size_bytes=page)
        for name, size in names.items()
    )


def _mapped(line: str, blocks: tuple[BlockRecord, ...], *, share: bool = True) -> str:
    words = shlex.split(line)
    plan = plan_image(words, blocks, share=share)
    assert not plan.streamed
    return shlex.join(map_image(words, plan, {number: number for number in range(9)}))


def _file(block: int, size_mib: int, *, share: str = "on", canonical: str = "off") -> str:
    return (
        f"size={size_mib * MIB},mem-path=/proc/self/fd/{block},share={share},"
        f"x-use-canonical-path-for-ramblock-id={canonical}"
    )


def test_plain_ram_gets_a_backend_of_its_own_name() -> None:
    blocks = _blocks(vga_vram=16, pc_ram=256)
    assert _mapped("-m 256M -M q35 -mem-path /tmp -mem-prealloc -S", blocks) == (
        f"-m 256M -M q35 -S -object memory-backend-file,id=pc.ram,{_file(1, 256)}"
        " -machine memory-backend=pc.ram"
    )


@pytest.mark.parametrize(
    "old",
    [
        "memory-backend-memfd,id=ram0,size=256M,share=on,seal=on,prealloc=on",
        "memory-backend-ram,id=ram0,size=256M,prealloc=on,prealloc-threads=4,reserve=off",
        "memory-backend-file,mem-path=/dev/shm/x,id=ram0,size=256M,pmem=off,discard-data=on",
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_a_backend_keeps_its_id(old: str, share: bool) -> None:
    found = _mapped(f"-M q35,memory-backend=ram0 -object {old}", _blocks(ram0=256), share=share)
    on = "on" if share else "off"
    assert found == (
        f"-M q35,memory-backend=ram0 -object memory-backend-file,id=ram0,{_file(0, 256, share=on)}"
    )


def test_json_and_policies_are_kept() -> None:
    found = _mapped(
        """-M q35,memory-backend=ram0 -object '{"qom-type":"memory-backend-ram","id":"ram0","""
        """"size":268435456,"host-nodes":[0],"policy":"bind","dump":false}'""",
        _blocks(ram0=256),
    )
    assert '"host-nodes":[0],"policy":"bind","dump":false' in found
    assert '"share":true' in found


def test_numa_nodes_and_dimms_each_get_a_file() -> None:
    numa = (
        "-object memory-backend-ram,id=a,size=64M -object memory-backend-memfd,id=b,size=96M"
        " -numa node,memdev=a -numa node,memdev=b"
    )
    found = _mapped(numa, _blocks(b=96, a=64))
    assert _file(1, 64) in found
    assert _file(0, 96) in found
    assert "-machine" not in found
    dimm = (
        "-m 64M,slots=2,maxmem=1G -object memory-backend-ram,id=d,size=32M -device pc-dimm,memdev=d"
    )
    found = _mapped(dimm, _blocks(pc_ram=64, d=32))
    assert _file(1, 32) in found
    assert _file(0, 64) in found


def test_old_machine_types_name_blocks_by_path() -> None:
    blocks = (BlockRecord(idstr="/objects/r", used_length_bytes=64 * MIB, page_size_bytes=4096),)
    found = _mapped("-machine memory-backend=r -object memory-backend-ram,id=r,size=64M", blocks)
    assert _file(0, 64, canonical="on") in found


@pytest.mark.parametrize(
    "more",
    [
        "-object memory-backend-file,id=n,size=64M,mem-path=/nv -device nvdimm,memdev=n",
        "-object memory-backend-ram,id=n,size=64M -device ivshmem-plain,memdev=n",
        "-object memory-backend-ram,id=n,size=64M",
    ],
)
def test_what_is_no_ram_goes_through_the_stream(more: str) -> None:
    plan = plan_image(shlex.split(f"-m 64M {more}"), _blocks(pc_ram=64, n=64), share=True)
    assert plan.blocks == (0,)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("-overcommit mem-lock=on", "locked"),
        ("-realtime mlock=on", "locked"),
        ("-realtime x=y", "locked"),
        ("-device vhost-user-blk-pci,chardev=c", "another process"),
        ('-device \'{"driver":"vhost-user-fs-pci","chardev":"c"}\'', "another process"),
        ("-netdev vhost-user,id=n,chardev=c", "another process"),
        ("-netdev type=vhost-user,id=n,chardev=c", "another process"),
        ("-object x-vfio-user-server,id=s", "another process"),
        ("-device vfio-pci,host=1", "needs all of RAM"),
        ("-device virtio-mem-pci,memdev=m", "partly plugged"),
    ],
)
def test_why_a_vm_is_streamed(more: str, reason: str) -> None:
    plan = plan_image(shlex.split(f"-m 64M {more}"), _blocks(pc_ram=64), share=True)
    assert reason in plan.streamed
    assert not plan.backends


def test_a_balloon_may_be_in_one_vm_but_not_in_clones() -> None:
    words = shlex.split("-m 64M -device virtio-balloon-pci,free-page-reporting=on")
    assert not plan_image(words, _blocks(pc_ram=64), share=True).streamed
    assert "would lose" in plan_image(words, _blocks(pc_ram=64), share=False).streamed


def test_huge_pages_and_tiny_ram_are_streamed() -> None:
    words = ["-m", "64M"]
    for share in (True, False):
        huge = plan_image(words, _blocks(2 << 20, pc_ram=64), share=share)
        assert huge.streamed == "RAM block 'pc.ram' is on huge pages"
    assert "no RAM block" in plan_image(words, _blocks(pc_ram=2), share=True).streamed


def test_what_no_image_holds_is_not_held_in_memory() -> None:
    words = shlex.split("-m 256M -M q35")
    assert not plan_image(words, _blocks(pc_ram=256, nvdimm=1024), share=True).streamed
    streamed = plan_image(words, _blocks(pc_ram=256, nvdimm=1025), share=True).streamed
    assert streamed == "1025 MiB of its RAM are in blocks that no image holds"
