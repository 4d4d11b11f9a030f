"""The guests and their launcher, with real boots."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from guests.consistency import MAGIC, ConsistencyReport, check_pages, guest_pages
from guests.monitor import qmp_execute
from guests.qemu import GuestVm, qemu_binary
from guests.serial import SerialConsole
from stillframe.errors import MachineError
from tests.support.guest_fixtures import GuestFactory
from tests.support.probes import has_multiboot_guest
from tests.support.stream_vm import into_file
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

MIB = 1 << 20


def measured_rate_mib_per_s(vm: GuestVm, seconds: float) -> float:
    first = vm.wait_tick()
    time.sleep(seconds)
    last = vm.wait_tick()
    return (last.pages - first.pages) * 4096 / MIB / ((last.t_ms - first.t_ms) / 1000)


def assert_writes_at(vm: GuestVm, mib_per_s: float) -> None:
    """It never writes faster, and as fast where the host lets it: it catches up with little of what
    a busy one has taken from it."""
    deadline = time.monotonic() + 120
    while (measured := measured_rate_mib_per_s(vm, 2)) < mib_per_s * 0.9:
        assert time.monotonic() < deadline, f"it writes {measured} MiB/s"
    assert measured <= mib_per_s * 1.1


def cpu_time_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ram_report(vm: GuestVm, file: Path, *, pieces: int = 1) -> ConsistencyReport:
    """Let QEMU itself save guest-physical memory, and check it; in several pieces if it runs."""
    piece_bytes = vm.ram_mib * MIB // pieces
    pages: list[bytes] = []
    for number in range(pieces):
        where = {"val": number * piece_bytes, "size": piece_bytes, "filename": str(file)}
        if number:
            vm.wait_tick()  # it goes on between two of them
        qmp_execute(vm.qmp_path, "pmemsave", where, timeout_s=60)
        pages += guest_pages(file.read_bytes())
    return check_pages(pages)


@pytest.mark.parametrize("memory", ["private", "memfd", "shm", "file"])
def test_linux_guest_writes_at_its_rate(linux_guest: GuestFactory, memory: str) -> None:
    vm = linux_guest(memory=memory, rate_mib_per_s=20)
    assert_writes_at(vm, 20)
    assert vm.is_progressing()
    assert vm.command("audit").startswith("audit ok pages=8192 ")


def test_the_linux_guests_agent_freezes_its_file_system(linux_guest: GuestFactory) -> None:
    vm = linux_guest(agent=True)
    vm.wait_agent()
    assert vm.ask_agent("guest-ping") == {}
    assert vm.ask_agent("guest-fsfreeze-status") == "thawed"
    wait_until(lambda: vm.command("write") == "write ok", within_s=60.0)
    assert vm.ask_agent("guest-fsfreeze-freeze") == 1
    assert vm.ask_agent("guest-fsfreeze-status") == "frozen"
    assert vm.command("write") == "write held"
    assert vm.is_progressing()
    with pytest.raises(MachineError, match="refused guest-get-time"):
        vm.ask_agent("guest-get-time")
    assert vm.ask_agent("guest-fsfreeze-thaw") == 1
    assert vm.ask_agent("guest-fsfreeze-status") == "thawed"
    wait_until(lambda: vm.command("write") == "write ok", within_s=60.0)
    assert vm.command("audit").startswith("audit ok pages=8192 ")


def test_a_guest_that_prints_nothing_is_started_once_more(tmp_path: Path) -> None:
    has_multiboot_guest().require()
    program, mark = tmp_path / "qemu", tmp_path / "started"
    first = f'[ -e {mark} ] || {{ touch {mark}; exec {qemu_binary()} "$@" -S; }}'
    program.write_text(f'#!/bin/sh\n{first}\nexec {qemu_binary()} "$@"\n')
    program.chmod(0o755)
    vm = GuestVm("multiboot", binary=str(program))
    with pytest.warns(UserWarning, match=r"started once more: (?s:.*)prelaunch(?s:.*)EIP="):
        vm.start(timeout_s=20)
    with vm:
        assert vm.is_progressing()
    program.write_text(f'#!/bin/sh\nexec {qemu_binary()} "$@" -S\n')
    with (
        pytest.warns(UserWarning, match="started once more"),
        pytest.raises(MachineError, match="did not print"),
    ):
        vm.start(timeout_s=1)
    assert not vm.alive()


def test_a_guest_that_rests_leaves_its_processor(linux_guest: GuestFactory) -> None:
    vm = linux_guest(rate_mib_per_s=20, append="sf.rest_us=5000")
    began_s, used_s = time.monotonic(), cpu_time_s(vm.pid)
    last = first = vm.wait_tick()
    while last.t_ms < first.t_ms + 2000:
        last = vm.wait_tick()
    assert last.pages > first.pages
    # One that never rests uses all of it, or what a busy host leaves to it.
    assert cpu_time_s(vm.pid) - used_s < 0.8 * (time.monotonic() - began_s)
    assert vm.command("audit").startswith("audit ok pages=8192 ")


def test_memory_of_huge_pages(multiboot_guest: GuestFactory) -> None:
    vm = multiboot_guest(memory="hugetlb", ram_mib=64, mem_mib=16)
    assert vm.command("audit").startswith("audit ok pages=4096 ")


def test_ram_of_a_stopped_guest_is_consistent(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(rate_mib_per_s=0)
    qmp_execute(vm.qmp_path, "stop")
    report = ram_report(vm, tmp_path / "ram")
    qmp_execute(vm.qmp_path, "cont")
    assert report.consistent, report
    assert report.pages == report.expected_pages == 8192
    assert vm.is_progressing()


def test_ram_read_from_a_running_guest_is_torn(linux_guest: GuestFactory, tmp_path: Path) -> None:
    """The control: without a stop, the same reading must be caught."""
    vm = linux_guest(rate_mib_per_s=0, whole=True)
    report = ram_report(vm, tmp_path / "ram", pieces=4)
    assert not report.consistent
    assert report.pages == 8192


def test_audit_finds_what_was_changed_behind_the_guest(linux_guest: GuestFactory) -> None:
    vm = linux_guest(rate_mib_per_s=-1, populate_mib=8, fill="text", memory="shm")
    assert vm.command("audit").startswith("audit ok pages=8192 populated=2048 ")
    ram = Path("/dev/shm") / f"stillframe-{vm.directory.name}"
    with ram.open("r+b") as file:
        image = file.read()
        page = next(iter(guest_pages(image)))
        file.seek(image.index(page) + 4088)
        file.write(bytes(8))
    answer = vm.command("audit")
    assert answer.startswith("audit FAILED ")
    assert " bad=1 " in answer
    assert " word=511 found=0" in answer


@pytest.mark.parametrize("stop_ms", [5, 60])
def test_a_stop_shows_in_the_guests_statistics(linux_guest: GuestFactory, stop_ms: int) -> None:
    vm = linux_guest(rate_mib_per_s=20)
    assert vm.command("reset") == "reset ok"
    before = time.monotonic()
    qmp_execute(vm.qmp_path, "stop")
    time.sleep(stop_ms / 1000)
    qmp_execute(vm.qmp_path, "cont")
    longest_ms = (time.monotonic() - before) * 1000
    stall_us = vm.console.settled_stall_us()
    assert stall_us >= stop_ms * 1000 - 500
    assert vm.wait_tick().stop_max_us <= longest_ms * 1000 + 500


def test_statistics_of_an_undisturbed_guest_show_no_stop(linux_guest: GuestFactory) -> None:
    vm = linux_guest(rate_mib_per_s=20)
    assert vm.command("reset") == "reset ok"
    vm.console.settled_stall_us()
    assert vm.wait_tick().stop_max_us == 0


def test_bare_metal_guest(multiboot_guest: GuestFactory, tmp_path: Path) -> None:
    vm = multiboot_guest(rate_mib_per_s=20, populate_mib=16)
    assert_writes_at(vm, 20)
    assert vm.command("audit").startswith("audit ok pages=8192 populated=4096 ")
    qmp_execute(vm.qmp_path, "stop")
    report = ram_report(vm, tmp_path / "ram")
    assert report.consistent, report


def test_bare_metal_guest_uses_memory_beyond_the_hole(multiboot_guest: GuestFactory) -> None:
    machine = "q35,max-ram-below-4g=512M"
    vm = multiboot_guest(machine=machine, ram_mib=1024, mem_mib=900, rate_mib_per_s=0)
    assert vm.command("audit").startswith("audit ok pages=230400 ")


def test_bare_metal_guest_under_kvm(multiboot_guest: GuestFactory, tmp_path: Path) -> None:
    vm = multiboot_guest(accelerator="kvm", rate_mib_per_s=0)
    assert vm.command("reset") == "reset ok"
    qmp_execute(vm.qmp_path, "stop")
    report = ram_report(vm, tmp_path / "ram")
    time.sleep(0.1)
    qmp_execute(vm.qmp_path, "cont")
    assert report.consistent, report
    assert vm.console.settled_stall_us() >= 100_000
    assert vm.command("audit").startswith("audit ok pages=8192 ")


def wait_status(vm: GuestVm, query: str, status: str) -> None:
    deadline = time.monotonic() + 60
    while qmp_execute(vm.qmp_path, query).get("status") != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def migrate_to_file(vm: GuestVm, file: Path) -> None:
    """Stop the VM and let QEMU itself write its stream."""
    qmp_execute(vm.qmp_path, "stop")
    qmp_execute(vm.qmp_path, "migrate-set-parameters", {"max-bandwidth": 1 << 40})
    qmp_execute(vm.qmp_path, "migrate", {"uri": into_file(file)})
    wait_status(vm, "query-migrate", "completed")
    wait_until(file.exists)


@pytest.mark.parametrize("corrupt", [False, True])
def test_audit_after_a_restore_by_qemu_itself(
    linux_guest: GuestFactory, tmp_path: Path, corrupt: bool
) -> None:
    file = tmp_path / "stream"
    # what is corrupt must not be written anew before the audit
    source = linux_guest(rate_mib_per_s=-1 if corrupt else 0, populate_mib=16)
    before = source.wait_tick()
    migrate_to_file(source, file)
    if corrupt:
        stream = bytearray(file.read_bytes())
        stream[stream.index(MAGIC) + 24] ^= 1
        file.write_bytes(stream)
    restored = linux_guest(wait_ready=False, extra=["-incoming", f"exec:cat {file}"])
    wait_status(restored, "query-status", "paused")
    qmp_execute(restored.qmp_path, "cont")
    assert restored.wait_tick().n > before.n
    assert restored.is_progressing()
    assert restored.command("audit").startswith("audit FAILED " if corrupt else "audit ok ")


def test_quit_ends_qemu(linux_guest: GuestFactory) -> None:
    vm = linux_guest()
    assert vm.command("quit") == "quit ok"
    assert vm.process.wait(60) == 0
    assert not vm.alive()
    assert not vm.is_progressing()


def test_another_console_can_take_over(linux_guest: GuestFactory) -> None:
    """As a harness does with a restored VM, of which it knows the socket only."""
    vm = linux_guest()
    vm.console.close()
    console = SerialConsole(vm.serial_path)
    assert console.is_progressing()
    assert console.command("audit").startswith("audit ok ")
    console.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"extra": ["-device", "no-such-device"]}, "QEMU ended at its start: .*no-such-device"),
        ({"ram_mib": 128, "mem_mib": 100}, "the guest did not start: fatal: not enough memory"),
    ],
)
def test_a_failed_start_is_explained_and_leaves_nothing(
    linux_guest: GuestFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    complaint: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(MachineError, match=complaint):
        linux_guest(**options)
    assert list(tmp_path.iterdir()) == []
