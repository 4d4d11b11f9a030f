"""Exports: sparse files and pipes give the same bytes; ELF headers; impossible maps."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.errors import DataError, NotFoundError, SinkError, UsageError
from stillframe.model import GpaRange
from stillframe.still.elf_notes import qemu_note
from stillframe.still.export_elf import export_elf, vcpus
from stillframe.still.export_qemu import export_qemu
from stillframe.still.export_raw import export_raw
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.store.backends.local import LocalSink
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.devices import DeviceSection, describe, make_section
from tests.support_store.faulty import FaultySink
from tests.support_store.memory import MemorySink
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    open_bytes,
    random_ram,
    write_ram,
)

HOLE = 128 * PAGE
MAP = (
    GpaRange(gpa=0, length_bytes=40 * PAGE, idstr="pc.ram", offset_bytes=0),
    GpaRange(gpa=HOLE, length_bytes=24 * PAGE, idstr="pc.ram", offset_bytes=40 * PAGE),
    GpaRange(gpa=1000 * PAGE, length_bytes=2 * PAGE, idstr="pc.bios", offset_bytes=PAGE),
)
RAM = random_ram(11)


def cpu_section(number: int) -> DeviceSection:
    """A vCPU whose registers count up; QEMU target/i386/machine.c, version 12."""
    base = (number + 1) << 32
    payload = struct.pack(">16QQQI", *range(base, base + 16), base + 100, 0x246, 0)
    payload += bytes(8) + bytes(80)
    for selector in range(10):
        payload += struct.pack(">IQII", selector + 1, base + selector, 0xFFFF, 0x9300)
    payload += bytes(20) + struct.pack(">4Q8QiI", *range(4), *range(8), -1, 0x1F80)
    payload += bytes(16 * 16) + bytes(8 * 6) + bytes(3000)
    return make_section(
        section_id=20 + number, idstr="cpu", instance_id=number, version_id=12, payload=payload
    )


def snapshot_with(memory_map: tuple[GpaRange, ...] = MAP, cpus: int = 2) -> Snapshot:
    sink = MemorySink()
    sections = [cpu_section(number) for number in reversed(range(cpus))]
    order = list(RAM)[::-1]
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        write_ram(writer, RAM, order=order, pages_per_frame=7)
        writer.append_stream(b"".join(section.raw for section in sections))
        writer.append_stream(stream_writer.eof())
        description = describe(sections, target_page_bytes=PAGE)
        writer.append_stream(stream_writer.vmdescription(description))
        writer.finish(manifest(memory_map=memory_map))
    return open_bytes(sink.content)


def block_bytes(number: int) -> bytes:
    pages = BLOCKS[number][1] // PAGE
    return b"".join(RAM[number, page] or bytes(PAGE) for page in range(pages))


def physical() -> bytes:
    out = bytearray(1002 * PAGE)
    ram = block_bytes(0)
    out[: 40 * PAGE] = ram[: 40 * PAGE]
    out[HOLE : HOLE + 24 * PAGE] = ram[40 * PAGE :]
    out[1000 * PAGE :] = block_bytes(2)[PAGE:]
    return bytes(out)


def both(tmp_path: Path, export: Callable[..., None], *args: object, **options: object) -> bytes:
    """Export into a sparse file and into a pipe-like sink; both must be the same."""
    path = tmp_path / "out"
    memory = MemorySink()
    sinks: list[Sink] = [LocalSink(path), memory]
    for sink in sinks:
        export(*args, sink, **options)
    assert path.read_bytes() == memory.content
    return memory.content


def test_raw_is_guest_physical(tmp_path: Path) -> None:
    assert both(tmp_path, export_raw, snapshot_with()) == physical()
    assert (tmp_path / "out").stat().st_blocks * 512 < 100 * PAGE


@pytest.mark.parametrize("number", range(3))
def test_raw_of_one_block(tmp_path: Path, number: int) -> None:
    name = BLOCKS[number][0]
    assert both(tmp_path, export_raw, snapshot_with(()), block=name) == block_bytes(number)


def test_a_block_that_is_mapped_twice(tmp_path: Path) -> None:
    part = GpaRange(gpa=0, length_bytes=3 * PAGE, idstr="pc.bios", offset_bytes=0)
    again = GpaRange(gpa=5 * PAGE + 100, length_bytes=PAGE, idstr="pc.bios", offset_bytes=PAGE + 50)
    content = both(tmp_path, export_raw, snapshot_with((again, part)))
    bios = block_bytes(2)
    expected = bios + bytes(2 * PAGE + 100) + bios[PAGE + 50 : 2 * PAGE + 50]
    assert content == expected


def test_the_qemu_export_is_the_stream(tmp_path: Path) -> None:
    snapshot = snapshot_with()
    assert both(tmp_path, export_qemu, snapshot) == b"".join(snapshot.iter_stream())


@pytest.mark.parametrize(
    "bad",
    [
        {"gpa": -1},
        {"gpa": 1 << 60},
        {"length_bytes": 0},
        {"length_bytes": -5},
        {"length_bytes": 65 * PAGE},
        {"offset_bytes": -1},
        {"offset_bytes": 60 * PAGE},
        {"gpa": 1001 * PAGE},
    ],
)
def test_impossible_maps(bad: dict[str, int]) -> None:
    values = {"gpa": 0, "length_bytes": 40 * PAGE, "offset_bytes": 0} | bad
    part = GpaRange(idstr="pc.ram", **values)
    sink = FaultySink("")
    with pytest.raises(DataError, match="memory map"):
        export_raw(snapshot_with((part, *MAP[1:])), sink)
    assert sink.calls[-1] == "abort"


def test_a_map_of_an_unknown_block() -> None:
    part = GpaRange(gpa=0, length_bytes=PAGE, idstr="pc.rma", offset_bytes=0)
    with pytest.raises(NotFoundError, match=r"pc\.rma"):
        export_raw(snapshot_with((part,)), MemorySink())


def test_without_a_map_a_block_must_be_named() -> None:
    for export in (export_raw, export_elf):
        with pytest.raises(UsageError, match="no guest-physical memory map") as caught:
            export(snapshot_with(()), MemorySink())
        assert "--block" in str(caught.value.remedy)


def test_unknown_block() -> None:
    with pytest.raises(NotFoundError):
        export_raw(snapshot_with(), MemorySink(), block="pc.rma")


def test_elf_layout(tmp_path: Path) -> None:
    content = both(tmp_path, export_elf, snapshot_with())
    assert content[:7] == b"\x7fELF\x02\x01\x01"
    kind, machine = struct.unpack_from("<HH", content, 16)
    assert (kind, machine) == (4, 62)
    place, _, _, _, entry_bytes, count = struct.unpack_from("<QQIHHH", content, 32)
    assert (place, entry_bytes, count) == (64, 56, 4)
    loads = []
    for number in range(1, count):
        header = struct.unpack_from("<IIQQQQQQ", content, place + number * entry_bytes)
        p_type, _, offset, vaddr, paddr, file_bytes, memory_bytes, _ = header
        assert (p_type, vaddr, file_bytes) == (1, 0, memory_bytes)
        assert offset % PAGE == 0
        assert content[offset : offset + file_bytes] == physical()[paddr : paddr + file_bytes]
        loads.append((paddr, file_bytes))
    assert loads == [(part.gpa, part.length_bytes) for part in MAP]


def test_the_note_of_qemus_own() -> None:
    """QEMU target/i386/arch_dump.c: struct QEMUCPUState."""
    (cpu,) = vcpus(snapshot_with(cpus=1).skeleton())
    note = qemu_note(cpu)
    assert note[:20] == struct.pack("<III", 5, 440, 0) + b"QEMU\0\0\0\0"
    content = note[20:]
    assert len(content) == 440
    base = 1 << 32
    order = [0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16)]  # rax rbx rcx rdx rsi rdi rsp rbp r8 ...
    assert struct.unpack_from("<II16Q", content) == (1, 440, *(base + n for n in order))
    assert struct.unpack_from("<QQ", content, 136) == (base + 100, 0x246)
    saved = ["es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr", "gdt", "idt"]
    for place, name in enumerate(["cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"]):
        number = saved.index(name)
        segment = struct.unpack_from("<IIIIQ", content, 152 + 24 * place)
        assert segment == (number + 1, 0xFFFF, 0x9300, 0, base + number)
    assert struct.unpack_from("<5Q", content, 392) == (0, 0, 1, 2, 3)  # cr0 cr1 cr2 cr3 cr4


@pytest.mark.skipif(shutil.which("readelf") is None, reason="missing program: readelf")
def test_readelf_accepts_it(tmp_path: Path) -> None:
    path = tmp_path / "core"
    export_elf(snapshot_with(), LocalSink(path))
    done = subprocess.run(
        ["readelf", "-aW", str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert done.stdout.count("NT_PRSTATUS") == 2
    assert done.stdout.count("QEMU") == 2


@pytest.mark.skipif(shutil.which("gdb") is None, reason="missing program: gdb")
def test_gdb_shows_the_registers(tmp_path: Path) -> None:
    path = tmp_path / "core"
    export_elf(snapshot_with(), LocalSink(path))
    done = subprocess.run(
        [
            "gdb",
            "-nx",
            "-batch",
            "-ex",
            "info registers",
            "-ex",
            "thread 2",
            "-ex",
            "info registers",
            "-c",
            str(path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    values = [line.split()[:2] for line in done.stdout.splitlines() if line[:1].islower()]
    names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]
    names += [f"r{number}" for number in range(8, 16)]
    for cpu in range(2):
        for position, name in enumerate(names):
            assert [name, hex(((cpu + 1) << 32) + position)] in values
        assert ["rip", hex(((cpu + 1) << 32) + 100)] in values


def test_elf_needs_a_vcpu() -> None:
    with pytest.raises(UsageError, match="no known vCPU"):
        export_elf(snapshot_with(cpus=0), MemorySink())


@pytest.mark.parametrize("export", [export_raw, export_elf, export_qemu])
@pytest.mark.parametrize("script", ["E", "wwP"])
def test_a_failing_destination(export: Callable[..., None], script: str) -> None:
    sink = FaultySink(script)
    with pytest.raises(SinkError):
        export(snapshot_with(), sink)
    assert sink.is_empty
    assert sink.calls[-1] == "abort"
