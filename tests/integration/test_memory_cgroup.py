"""``take`` inside the VM's memory cgroup (``kubectl exec``): whatever happens, the VM lives."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from guests.qemu import GuestVm, MemoryKind
from stillframe import api
from stillframe.capture import swapping
from stillframe.capture.swapping import SwapAccess, swapped_bytes
from stillframe.errors import HostError
from stillframe.kernel.memory_cgroups import NAMES
from stillframe.kernel.memory_cgroups import MemoryCgroup as Cgroup
from stillframe.kernel.proc_maps import read_maps, read_smaps
from stillframe.snapshot import memory_limit
from stillframe.snapshot.memory_limit import (
    check_room_for_swap,
    first_to_be_killed,
    spill_within_limit,
)
from tests.support.memory_cgroup import MemoryCgroup
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.swap import swap_out, swap_space
from tests.support.taking import command
from tests.support.waiting import wait_until
from tests.support.writer_process import FULL_SPEED, IDLE, Captured, WriterProcess, armed, drain

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    has_uffd_wp().require()
    made = MemoryCgroup()
    yield made
    wait_until(lambda: _is_removed(made.path), "somebody stays in it")


def _is_removed(cgroup: Path) -> bool:
    """Not as long as whoever was killed in it, or guards after its end, is not quite gone."""
    try:
        cgroup.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.fixture
def vm(cgroup: MemoryCgroup) -> Iterator[GuestVm]:
    """A guest that writes all of 128 MiB again and again, charged to the cgroup."""
    has_linux_guest().require()
    guest = GuestVm("linux", ram_mib=384, mem_mib=192, rate_mib_per_s=0)
    with cgroup.joined():
        guest.start()
    yield guest
    guest.stop()


def take_inside(cgroup: MemoryCgroup, vm: GuestVm, file: Path) -> subprocess.CompletedProcess[str]:
    words = command("take", str(vm.qmp_path), "-o", str(file), "--quiet", "--spill", "1G")
    script = f'echo 0 > {cgroup.path}/cgroup.procs; exec "$@"'
    return subprocess.run(
        ["sh", "-c", script, "sh", *words], capture_output=True, text=True, timeout=120, check=False
    )


def test_too_little_room_is_told_beforehand(
    cgroup: MemoryCgroup, vm: GuestVm, tmp_path: Path
) -> None:
    cgroup.leave(64 * MIB)
    done = take_inside(cgroup, vm, tmp_path / "a.still")
    assert vm.is_progressing()
    assert done.returncode in (5, -9), done.stderr
    if done.returncode == 5:
        assert "memory cgroup" in done.stderr
    assert list(tmp_path.iterdir()) == []
    # The remedy: outside of the cgroup.
    api.take(str(vm.qmp_path), tmp_path / "a.still").wait(120)
    assert vm.is_progressing()


def test_with_some_room_it_is_taken_in_bounds(
    cgroup: MemoryCgroup, vm: GuestVm, tmp_path: Path
) -> None:
    cgroup.leave(200 * MIB)
    done = take_inside(cgroup, vm, tmp_path / "a.still")
    assert vm.is_progressing()
    assert done.returncode == 0, done.stderr


def test_what_is_left_bounds_the_spill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the narrowest cgroup; what the page cache holds counts as free. Of version 2 here."""
    (tmp_path / "memory.current").write_text(f"{900 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nactive_file {MIB}\ninactive_file {MIB}\n")
    monkeypatch.setattr(memory_limit, "memory_cgroups", lambda _: [Cgroup("cgroup2", tmp_path)])
    for limit, spill in (("max", 256), (2000 * MIB, 256), (1000 * MIB, 27)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert spill_within_limit(1, 256 * MIB) == spill * MIB
    (tmp_path / "memory.max").write_text(str(910 * MIB))
    with pytest.raises(HostError, match="12 MiB are left"):
        spill_within_limit(1, 256 * MIB)


def test_we_are_the_one_to_be_killed() -> None:
    score = Path("/proc/self/oom_score_adj")
    before = score.read_text()
    with first_to_be_killed():
        assert score.read_text().strip() == "1000"
    assert score.read_text() == before


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_what_is_in_swap_stays_there(kind: str, tmp_path: Path) -> None:
    """Also where there is room for it: reading drives nothing out that the VM has in memory."""
    has_uffd_wp().require()
    with swap_space(tmp_path, 256), ExitStack() as stack:
        writer = stack.enter_context(WriterProcess(kind, 64, FULL_SPEED))
        assert writer.runs()
        writer.command("p")
        swap_out_until(writer, 24 * MIB, lambda swapped: swapped > 16 * MIB)
        before = swapped_bytes(writer.pid, [writer.block])
        access = stack.enter_context(closing(SwapAccess(writer.pid, is_tight=False)))
        pages = take_standing(writer, access)
        assert swapped_bytes(writer.pid, [writer.block]) > before * 0.95
        assert take_standing(writer) == pages  # the control: it is read for good
        assert swapped_bytes(writer.pid, [writer.block]) < before * 0.05
        writer.command("c")
        assert writer.runs()


def test_what_else_of_the_vmm_is_in_swap_does_not_count(tmp_path: Path) -> None:
    """Some of an idle VMM's heap often is; its guest's RAM is what we read."""
    with swap_space(tmp_path, 256), WriterProcess("private", 16, IDLE) as writer:
        for vma in read_maps(writer.pid).vmas:
            if "heap" in vma.path or "stack" in vma.path:
                swap_out(writer.pid, vma.start, vma.length_bytes)
        other = sum(detail.swapped_bytes for detail in read_smaps(writer.pid))
        assert other > 0
        assert swapped_bytes(writer.pid, [writer.block]) == 0
        swap_out_until(writer, 4 * MIB, lambda swapped: swapped == 4 * MIB)


def swap_out_until(writer: WriterProcess, length_bytes: int, enough: Callable[[int], bool]) -> None:
    """The kernel leaves pages in that another processor has just handled, at first."""

    def is_enough() -> bool:
        swap_out(writer.pid, writer.block.hva, length_bytes)
        return enough(swapped_bytes(writer.pid, [writer.block]))

    wait_until(is_enough)


def take_standing(
    writer: WriterProcess, access: SwapAccess | None = None
) -> dict[int, bytes | None]:
    captured = Captured()
    with armed(writer) as capture:
        if access is not None:
            capture.leave_in_swap(access)
        capture.instant()
        drain(capture, captured)
        capture.finish()
        capture.check()
    return captured.pages


def test_without_the_right_to_reclaim_it_is_refused_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit, usage, _prefix = NAMES["cgroup2"]
    (tmp_path / usage).write_text(str(400 * MIB))
    (tmp_path / "memory.stat").write_text("anon 1\n")
    (tmp_path / "memory.swap.current").write_text(str(20 * MIB))
    monkeypatch.setattr(memory_limit, "memory_cgroups", lambda _: [Cgroup("cgroup2", tmp_path)])
    monkeypatch.setattr(memory_limit, "swapped_bytes", lambda _pid, _blocks: 20 * MIB)
    monkeypatch.setattr(swapping, "may_swap_out", lambda _pidfd: -errno.EPERM)
    (tmp_path / limit).write_text(str(450 * MIB))
    assert memory_limit.swap_access(os.getpid(), []) is None
    (tmp_path / limit).write_text(str(410 * MIB))
    with pytest.raises(HostError, match="swaps 20 MiB in") as raised:
        memory_limit.swap_access(os.getpid(), [])
    assert "as root" in str(raised.value.remedy)


@pytest.mark.parametrize("memory", ["memfd", "private"])
def test_a_vm_that_swaps_inside_its_limit_is_taken(
    memory: MemoryKind, cgroup: MemoryCgroup, tmp_path: Path
) -> None:
    """It has much of its RAM in swap, and no room to swap it in."""
    has_linux_guest().require()
    guest = GuestVm("linux", ram_mib=384, mem_mib=192, rate_mib_per_s=4, memory=memory)
    with swap_space(tmp_path, 512), ExitStack() as stack:
        with cgroup.joined():
            guest.start()
        stack.callback(guest.stop)
        with api.connect(str(guest.qmp_path)) as machine:
            ram = max(machine.ram_blocks(), key=lambda block: block.used_length_bytes)
        swap_out(guest.pid, ram.hva, ram.used_length_bytes)
        before = swapped_bytes(guest.pid, [ram])
        assert before > 100 * MIB
        cgroup.leave(16 * MIB)
        taken = api.take(str(guest.qmp_path), tmp_path / "a.still").wait(120)
        assert any("swap" in note for note in taken.notes)
        assert guest.is_progressing()
        assert swapped_bytes(guest.pid, [ram]) > before * 0.5


@pytest.mark.parametrize("kind", ["cgroup", "cgroup2"])
def test_a_vm_that_swaps_inside_its_limit_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Swapping it in would get it killed; what is left must have room for all that is swapped."""
    limit, usage, _prefix = NAMES[kind]
    (tmp_path / usage).write_text(str(400 * MIB))
    (tmp_path / limit).write_text(str(410 * MIB))
    monkeypatch.setattr(memory_limit, "memory_cgroups", lambda _: [Cgroup(kind, tmp_path)])
    for swapped in (5 * MIB, 20 * MIB):
        (tmp_path / "memory.stat").write_text(f"total_swap {swapped}\n")
        (tmp_path / "memory.swap.current").write_text(f"{swapped}\n")
        if swapped == 5 * MIB:
            check_room_for_swap(1)
    with pytest.raises(HostError, match="swaps 20 MiB in, 10 MiB are left"):
        check_room_for_swap(1)
