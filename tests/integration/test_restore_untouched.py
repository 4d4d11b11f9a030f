"""A restored VM is as large as what its source had in use, and its RAM is equal page by page."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import qemu_binary
from stillframe.errors import HostError
from stillframe.machine.finding import connect
from stillframe.machine.qemu.ramblocks import read_ram_blocks
from stillframe.qmp.client import QmpClient
from stillframe.restore import available, vm_set
from stillframe.restore.start import RestoredVm, restore
from stillframe.restore.untouched import touched_pages
from stillframe.store import open_snapshot
from tests.support.bare_vm import BareVm
from tests.support.probes import has_huge_pages, has_qemu, has_uffd_wp
from tests.support.taking import take

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not has_qemu(), reason=f"missing qemu: {has_qemu().reason}"),
]

MIB = 1 << 20
SHARED = "share=on,id=m,size=1G"
MEMORY = {
    "private": [],
    "memfd": ["-object", f"memory-backend-memfd,{SHARED}"],
    "unnamed": ["-object", f"memory-backend-ram,{SHARED}"],
    "private-memfd": ["-object", "memory-backend-memfd,share=off,id=m,size=1G"],
    "hugetlb": ["-object", "memory-backend-memfd,hugetlb=on,reserve=off,share=on,id=m,size=512M"],
    "hugetlb-private": [
        "-object", "memory-backend-memfd,hugetlb=on,reserve=off,share=off,id=m,size=512M",
    ],
}  # fmt: skip


class FromBare:
    """A bare VM as ``taking`` wants it."""

    def __init__(self, vm: BareVm) -> None:
        self.qmp_path = Path(vm.qmp)

    def is_progressing(self, within_s: float = 1.0) -> bool:
        return True


@contextlib.contextmanager
def restored(file: Path, directory: Path) -> Iterator[RestoredVm]:
    # Whole, since reading at a hole of an image that is being filled answers EIO.
    vm = restore(file, paused=True, wait=True, directory=directory, program=qemu_binary())
    try:
        yield vm
    finally:
        os.kill(vm.pid, signal.SIGKILL)


def in_use_bytes(pid: int, backend: str) -> int:
    """What the blocks take: of the process's own, and of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = {line.split(":")[0]: line.split() for line in status.splitlines()}
    names = ("RssAnon", "RssShmem", "HugetlbPages")
    return sum(int(fields[name][1]) << 10 for name in names)


def assert_equal_ram(file: Path, vm: RestoredVm) -> None:
    with (
        open_snapshot(file) as snapshot,
        connect(vm.qmp_address) as machine,
        open(f"/proc/{vm.pid}/mem", "rb") as memory,
    ):
        places = {block.idstr: block.hva for block in machine.ram_blocks()}
        assert set(places) == {block.idstr for block in snapshot.blocks}
        for block in snapshot.blocks:
            for page, content in snapshot.iter_pages(block.idstr):
                if content is None and block.used_length_bytes > 16 * MIB:
                    continue  # looked at below: reading would fill it
                memory.seek(places[block.idstr] + page * 4096)
                assert memory.read(4096) == (content or bytes(4096)), (block.idstr, page)
            if block.used_length_bytes > 16 * MIB:
                zero = [p for p, content in snapshot.iter_pages(block.idstr) if content is None]
                for page in zero[:: max(1, len(zero) // 3000)]:
                    memory.seek(places[block.idstr] + page * 4096)
                    assert not any(memory.read(4096)), (block.idstr, page)


@pytest.mark.parametrize("memory", MEMORY)
def test_untouched_ram_stays_untouched(memory: str, tmp_path: Path) -> None:
    has_uffd_wp().require()
    if memory.startswith("hugetlb"):
        has_huge_pages(200).require()
    options = MEMORY[memory]
    size = "512" if memory.startswith("hugetlb") else "1024"
    more = ["-M", "q35,memory-backend=m"] if options else ["-M", "q35"]
    file = tmp_path / "a.still"
    with BareVm(*more, "-m", size, *options) as vm:
        before = in_use_bytes(vm.pid, memory)
        result = take(FromBare(vm), file)
        assert in_use_bytes(vm.pid, memory) < before + 24 * MIB, "the take filled RAM"
    pages = result.statistics.pages
    assert pages.never_populated > 0.5 * pages.total
    with restored(file, tmp_path / "vm") as new:
        assert in_use_bytes(new.pid, memory) < before + 64 * MIB
        assert_equal_ram(file, new)


def test_what_a_new_vm_was_given_counts_as_touched(tmp_path: Path) -> None:
    """A reused file of shared memory, and what QEMU itself fills beforehand."""
    reused = Path(f"/dev/shm/still-reused-{os.getpid()}")
    reused.write_bytes(b"\xff" * (64 * MIB))
    try:
        backend = f"memory-backend-file,mem-path={reused},share=on,id=m,size=64M"
        with (
            BareVm("-S", "-m", "64", "-object", backend, "-machine", "memory-backend=m") as vm,
            QmpClient.connect(vm.qmp, timeout_s=60) as qmp,
        ):
            touched = touched_pages(vm.pid, qmp)
            blocks = {block.idstr: block for block in read_ram_blocks(vm.pid, qmp)}
            assert touched.keys() == blocks.keys()
            assert touched["m"][0] == (0, 64 * MIB // 4096)
            assert touched["pc.bios"][0] == (0, blocks["pc.bios"].used_length_bytes // 4096)
    finally:
        reused.unlink()


def test_too_little_memory_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_uffd_wp().require()
    file = tmp_path / "a.still"
    with BareVm("-M", "q35", "-m", "64") as vm:
        take(FromBare(vm), file)

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a VM was started")

    monkeypatch.setattr(vm_set, "Emulator", started)
    monkeypatch.setattr(available, "_host_free", lambda: 4096)
    with pytest.raises(HostError, match="too little memory") as caught:
        restore(file, directory=tmp_path / "vm", program=qemu_binary())
    assert caught.value.remedy
    assert not (tmp_path / "vm").exists()
