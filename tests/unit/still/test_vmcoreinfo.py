"""The kernel's VMCOREINFO note: told by the device, or found in RAM."""

from __future__ import annotations

import struct

import pytest

from stillframe.model import GpaRange
from stillframe.still.export_elf import export_elf
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate import writer as stream_writer
from stillframe.vmstate.devices import DeviceSection, describe, make_section
from tests.support_store.memory import MemorySink
from tests.support_store.small import BLOCKS, PAGE, head, manifest, open_bytes, write_ram
from tests.unit.still.test_exports import cpu_section

TEXT = 0xFFFFFFFF9A000000
GPA = 1 << 20
MAP = (GpaRange(gpa=GPA, length_bytes=64 * PAGE, idstr="pc.ram", offset_bytes=0),)


def note(text: int = TEXT, size: int = 3000) -> bytes:
    content = f"OSRELEASE=6.1\nSYMBOL(_stext)={text:x}\n".encode().ljust(size, b"#")
    return struct.pack("<III", 11, size, 0) + b"VMCOREINFO\0\0" + content


def device(gpa: int, size: int, *, given: bool = True, guest_format: int = 1) -> DeviceSection:
    payload = struct.pack(">?HHIQ", given, 0, guest_format, size, gpa)
    return make_section(
        section_id=40, idstr="vmcoreinfo", instance_id=0, version_id=1, payload=payload
    )


def kernel_cpu() -> DeviceSection:
    """A vCPU whose entry of system calls is in the kernel's text."""
    section = cpu_section(0)
    payload = bytearray(section.payload)
    lstar = len(payload) - 3000 - 8 * 6 + 16
    payload[lstar : lstar + 8] = struct.pack(">Q", TEXT + 0xA00080)
    return make_section(
        section_id=20, idstr="cpu", instance_id=0, version_id=12, payload=bytes(payload)
    )


def exported(pages: dict[int, bytes], *devices: DeviceSection) -> bytes:
    """An ELF core of a VM with these pages in its RAM."""
    ram: dict[tuple[int, int], bytes | None] = {
        (block, page): None
        for block, (_, size) in enumerate(BLOCKS)
        for page in range(size // PAGE)
    }
    ram |= {(0, page): content.ljust(PAGE, b"\0") for page, content in pages.items()}
    sections, sink, core = [kernel_cpu(), *devices], MemorySink(), MemorySink()
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        write_ram(writer, ram, order=list(ram), pages_per_frame=7)
        writer.append_stream(b"".join(s.raw for s in sections) + stream_writer.eof())
        description = describe(sections, target_page_bytes=PAGE)
        writer.append_stream(stream_writer.vmdescription(description))
        writer.finish(manifest(memory_map=MAP))
    with open_bytes(sink.content) as snapshot:
        export_elf(snapshot, core)
    return core.content


def notes(core: bytes) -> bytes:
    offset, length = struct.unpack_from("<8xQ16xQ", core, 64)
    return core[offset : offset + length]


def test_found_at_the_start_of_a_page() -> None:
    assert notes(exported({9: b"x" * 16 + note(), 33: note()})).endswith(note())


@pytest.mark.parametrize("size", [2999, PAGE - 24, PAGE + 100])
def test_found_in_any_length(size: int) -> None:
    whole = note(size=size)
    core = exported({33: whole[:PAGE], 34: whole[PAGE:]})
    assert notes(core).endswith(whole.ljust(len(whole) + -len(whole) % 4, b"\0"))


def test_one_of_an_earlier_boot_is_left() -> None:
    stale = note(TEXT + (1 << 30))
    assert notes(exported({3: stale, 33: note()})).endswith(note())
    assert b"VMCOREINFO" not in notes(exported({3: stale}))


def test_the_device_tells_where_it_is() -> None:
    """Anywhere, and whatever else looks like one."""
    told = note(TEXT + 4, 500)
    core = exported({33: note(), 50: b"-" * 40 + told}, device(GPA + 50 * PAGE + 40, len(told)))
    assert notes(core).endswith(told)


@pytest.mark.parametrize(
    "section",
    [
        device(GPA + 50 * PAGE, 524, given=False),
        device(GPA + 50 * PAGE, 524, guest_format=0),
        device(GPA + 50 * PAGE, 0),
        device(GPA + 50 * PAGE, 100),
        device(GPA + 51 * PAGE, 524),
        device(GPA + 63 * PAGE, 0xFFFFFFFF),
        device(0, 524),
        device(GPA + 63 * PAGE + 4090, 524),
        device((1 << 64) - 1, 524),
    ],
)
def test_what_the_device_tells_is_not_believed_blindly(section: DeviceSection) -> None:
    core = exported({33: note(), 50: note(TEXT + 4, 500)}, section)
    assert notes(core).endswith(note())


@pytest.mark.parametrize(
    "page",
    [
        note()[:-1000].ljust(PAGE, b"\0").replace(struct.pack("<I", 3000), b"\xff\xff\0\0"),
        note().replace(b"SYMBOL(_stext)", b"SYMBOL(_other)"),
        note().replace(b"ffffffff9a", b"ffffffffzz"),
        note()[4:],
    ],
)
def test_what_only_looks_like_one(page: bytes) -> None:
    assert b"VMCOREINFO" not in notes(exported({33: page}))
