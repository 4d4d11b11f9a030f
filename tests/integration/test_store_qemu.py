"""The snapshot file against real QEMUs: import what QEMU saved, load what we export."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guests.monitor import qmp_execute
from guests.qemu import GuestVm, qemu_binary
from stillframe.still.export_elf import export_elf
from stillframe.still.export_qemu import export_qemu
from stillframe.still.export_raw import export_raw
from stillframe.still.import_stream import import_stream
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.listening import wait_listening
from tests.support.probes import has_qemu
from tests.support.stream_vm import into_file
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

MACHINE = ("-M", "q35", "-m", "64", "-vga", "std")
RAM_BYTES = 64 << 20
LOW_RAM = (0, 0xA0000)
HIGH_RAM = (0x100000, RAM_BYTES)
"""Between the two a PC shows other things than RAM."""


def hmp(monitor: Path, line: str) -> str:
    """A command of the human monitor; its lines end with LF."""
    answer: str = qmp_execute(
        monitor, "human-monitor-command", {"command-line": line}, timeout_s=60
    )
    return answer.replace("\r\n", "\n")


@contextmanager
def qemu(directory: Path, *arguments: str) -> Iterator[Path]:
    """A QEMU of ``MACHINE``; gives its monitor. It must not say a word."""
    directory.mkdir()
    monitor = directory / "qmp.sock"
    with (directory / "log").open("wb") as log:
        command = [qemu_binary(), "-nodefaults", "-display", "none", *MACHINE]
        command += ["-qmp", f"unix:{monitor},server=on,wait=off", *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            wait_listening(monitor, alive=lambda: process.poll() is None)
            yield monitor
        finally:
            process.kill()
            process.wait(60)
    assert (directory / "log").read_text() == ""


def save(monitor: Path, path: Path) -> None:
    """Let QEMU save the VM into a file."""
    qmp_execute(monitor, "migrate", {"uri": into_file(path)})

    def status() -> Any:
        return qmp_execute(monitor, "query-migrate").get("status")

    wait_until(lambda: status() not in (None, "setup", "active", "device"))
    assert status() == "completed"
    wait_until(path.exists)


def import_file(stream: Path, path: Path) -> None:
    with stream.open("rb") as source:
        import_stream(source, LocalSink(path), stillframe_version="0.1.0")


def test_a_saved_vm_goes_round(tmp_path: Path) -> None:
    has_qemu().require()
    saved, still = tmp_path / "saved.stream", tmp_path / "x.still"
    with qemu(tmp_path / "first") as monitor:
        # SeaBIOS has finished when the BIOS data area knows the memory size and the vCPU halts.
        wait_until(lambda: "HLT=1" in hmp(monitor, "info registers"))
        qmp_execute(monitor, "stop")
        registers = hmp(monitor, "info registers")
        memory = tmp_path / "memory"
        qmp_execute(monitor, "pmemsave", {"val": 0, "size": RAM_BYTES, "filename": str(memory)})
        save(monitor, saved)

    import_file(saved, still)
    exported, raw = tmp_path / "exported.stream", tmp_path / "x.raw"
    with open_snapshot(still) as snapshot:
        report = snapshot.verify()
        assert report.missing_pages == 0
        assert report.data_pages > 50
        assert {"timer", "cpu", "0000:00:01.0/vga", "globalstate"} <= set(report.devices)
        assert {"pc.ram", "pc.bios", "0000:00:01.0/vga.vram"} <= {b.idstr for b in snapshot.blocks}
        export_qemu(snapshot, LocalSink(exported))
        export_raw(snapshot, LocalSink(raw))
    ours, theirs = raw.read_bytes(), memory.read_bytes()
    assert len(ours) == RAM_BYTES
    for start, end in (LOW_RAM, HIGH_RAM):
        assert ours[start:end] == theirs[start:end]
    plain = subprocess.run(["zstd", "-dc", str(still)], capture_output=True, check=True)
    assert plain.stdout == exported.read_bytes()

    with qemu(tmp_path / "second", "-S", "-incoming", f"exec:cat {exported}") as monitor:
        wait_until(lambda: qmp_execute(monitor, "query-status")["status"] == "paused")
        assert hmp(monitor, "info registers") == registers
        loaded = tmp_path / "loaded"
        qmp_execute(monitor, "pmemsave", {"val": 0, "size": RAM_BYTES, "filename": str(loaded)})
        qmp_execute(monitor, "cont")
        wait_until(lambda: qmp_execute(monitor, "query-status")["status"] == "running")
    theirs = loaded.read_bytes()
    for start, end in (LOW_RAM, HIGH_RAM):
        assert ours[start:end] == theirs[start:end]


def elf_segments(path: Path) -> dict[tuple[int, int], bytes]:
    """Content of an ELF64 core's segments by (type, guest-physical address)."""
    content = path.read_bytes()
    table, count = (
        struct.unpack_from("<Q", content, 32)[0],
        struct.unpack_from("<H", content, 56)[0],
    )
    segments: dict[tuple[int, int], bytes] = {}
    for number in range(count):
        kind, _, offset, _, gpa, length = struct.unpack_from(
            "<IIQQQQ", content, table + 56 * number
        )
        segments[kind, gpa] = content[offset : offset + length]
    return segments


def gdb_registers(core: Path, directory: Path) -> dict[str, str]:
    done = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "info registers", "-c", str(core)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(directory)},
    )
    lines = (line.split() for line in done.stdout.splitlines())
    return {line[0]: line[1] for line in lines if len(line) > 1}


READ_BANNER = """
import sys, drgn
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
core = drgn.Program()
core.set_core_dump(sys.argv[1])
core.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(core), enable_index=0)
sys.stdout.buffer.write(core.read_c_string(core.symbol("linux_banner").address))
"""


def kernel_banner_by_drgn(core: Path) -> str:
    """Through the kernel's page tables, by its own symbol table."""
    command = [sys.executable, "-c", READ_BANNER, str(core)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def osrelease_by_crash(core: Path) -> str:
    command = ["crash", "--osrelease", str(core)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


def test_the_elf_core_is_the_one_that_qemu_dumps(
    tmp_path: Path, linux_guest: Callable[..., GuestVm]
) -> None:
    vm = linux_guest(ram_mib=128, mem_mib=8, vcpus=2)
    monitor = vm.qmp_path
    saved, dump, core = tmp_path / "saved.stream", tmp_path / "dump", tmp_path / "core"
    qmp_execute(monitor, "stop")
    registers = hmp(monitor, "info registers")
    hmp(monitor, f"dump-guest-memory {dump}")
    save(monitor, saved)
    import_file(saved, tmp_path / "x.still")
    with open_snapshot(tmp_path / "x.still") as snapshot:
        snapshot.verify()
        export_elf(snapshot, LocalSink(core))
    ours, theirs = elf_segments(core), elf_segments(dump)
    note, load = 4, 1
    # QEMU has the kernel's note only with -device vmcoreinfo.
    assert ours[note, 0].startswith(theirs[note, 0])
    assert b"VMCOREINFO\0\0OSRELEASE=" in ours[note, 0][len(theirs[note, 0]) :]
    assert kernel_banner_by_drgn(core).startswith("Linux version ")
    assert osrelease_by_crash(core) == kernel_banner_by_drgn(core).split()[2]
    for start, end in (LOW_RAM, (HIGH_RAM[0], 128 << 20)):
        assert ours[load, 0][start:end] == theirs[load, 0][start:end]
    shown = gdb_registers(core, tmp_path)
    for name in ("RAX", "RSP", "RIP", "R15"):
        value = registers.split(f"{name}=")[1].split()[0]
        assert int(shown[name.lower()], 16) == int(value, 16)
