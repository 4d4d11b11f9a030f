"""Streams for tests, from parts that the writer does not write (other QEMU's records)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from struct import pack

from stillframe.vmstate import writer
from stillframe.vmstate.devices import DeviceSection, describe, make_section
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Event, Pages, RamBlocks, ZeroRun

PAGE = 4096
RAM_ID = 2


class Pipe(io.RawIOBase):
    """A source that only reads, in small uneven pieces."""

    def __init__(self, data: bytes, piece_bytes: int = 1 << 20) -> None:
        self._data = io.BytesIO(data)
        self._piece_bytes = piece_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._piece_bytes))


def word(offset_bytes: int, flags: int) -> bytes:
    return pack(">Q", offset_bytes | flags)


def name(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def head(machine: str | None = "pc-q35-7.2") -> bytes:
    return writer.stream_header() + (writer.configuration_section(machine) if machine else b"")


def configuration(machine: str, *subsections: bytes) -> bytes:
    return writer.stream_header() + writer.configuration_section(machine) + b"".join(subsections)


def subsection(suffix: str, body: bytes, version: int = 1) -> bytes:
    return b"\x05" + name(f"configuration/{suffix}") + pack(">I", version) + body


def capabilities(*names: str) -> bytes:
    return subsection("capabilities", pack(">I", len(names)) + b"".join(map(name, names)))


def start(payload: bytes, *, section_id: int = RAM_ID, footer: bool = True) -> bytes:
    """A RAM START section with this payload."""
    out = b"\x01" + pack(">I", section_id) + name("ram") + pack(">II", 0, 4) + payload
    return out + (b"\x7e" + pack(">I", section_id) if footer else b"")


def part(payload: bytes, *, section_id: int = RAM_ID, kind: int = 2) -> bytes:
    """A RAM PART or END section with this payload and an EOS record."""
    return (
        bytes((kind,)) + pack(">I", section_id) + payload + word(0, 0x10)
        + b"\x7e" + pack(">I", section_id)
    )  # fmt: skip


def tail(devices: Sequence[DeviceSection], *, described: bool = True) -> bytes:
    raw = b"".join(d.raw for d in devices) + writer.eof()
    if described:
        raw += writer.vmdescription(describe(devices, target_page_bytes=PAGE))
    return raw


def device(section_id: int, idstr: str, payload: bytes = b"", instance: int = 0) -> DeviceSection:
    return make_section(
        section_id=section_id, idstr=idstr, instance_id=instance, version_id=1, payload=payload
    )


def ram_stream(
    payload: bytes, *, blocks: Sequence[tuple[str, int]] = (("ram0", 4 * PAGE),)
) -> bytes:
    """A whole stream with one RAM part of this payload."""
    return head() + writer.ram_start_section(blocks, section_id=RAM_ID) + part(payload) + tail(())


def read(data: bytes, **options: object) -> list[Event]:
    return list(StreamReader(io.BytesIO(data), **options).events())  # type: ignore[arg-type]


def replay(events: Sequence[Event], page_bytes: int = PAGE) -> dict[str, bytes]:
    """RAM as the events leave it; pages that did not come are zero."""
    names: list[str] = []
    ram: list[bytearray] = []
    for event in events:
        if isinstance(event, RamBlocks):
            names = [b.idstr for b in event.blocks]
            ram = [bytearray(b.used_length_bytes) for b in event.blocks]
        elif isinstance(event, Pages):
            end = event.offset_bytes + len(event.data)
            ram[event.block_index][event.offset_bytes : end] = event.data
        elif isinstance(event, ZeroRun):
            end = event.offset_bytes + event.pages * page_bytes
            ram[event.block_index][event.offset_bytes : end] = bytes(end - event.offset_bytes)
    return {n: bytes(r) for n, r in zip(names, ram, strict=True)}
