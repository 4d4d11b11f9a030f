"""The stream without its pages: configuration, device sections, description."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from stillframe.model import BlockRecord, GpaRange
from stillframe.still.frame_reader import FrameReader
from stillframe.still.records import is_ram_section
from stillframe.vmstate.devices import DeviceSection
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Configuration, Description, Device
from stillframe.vmstate.x86_cpu import X86CpuState
from stillframe.wings import hooks


class Skeleton(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream holds besides RAM. ``description``: the vmdescription's JSON, if any."""

    configuration: Configuration | None
    devices: tuple[DeviceSection, ...]
    description: bytes | None


def machine_type_of(skeleton: Skeleton) -> str:
    """Return the machine type that a stream names; empty if it names none."""
    return skeleton.configuration.name if skeleton.configuration is not None else ""


class SavedKind(Protocol):
    """A wing's knowledge of its machines' saved state (``stillframe.wings``).

    ``machine_prefix``: start of their machine types.
    """

    machine_prefix: str

    def parse_cpu(self, payload: bytes, version_id: int) -> X86CpuState:
        """Return the registers in a section named ``cpu``. Raises DataError."""

    def memory_map(self, blocks: Sequence[BlockRecord]) -> tuple[GpaRange, ...]:
        """Return where the guest sees these blocks, if no map was recorded."""


def saved_kind(machine_type: str) -> SavedKind | None:
    """Return the wing's knowledge of a machine; None for a QEMU machine."""
    kinds: list[SavedKind] = hooks("still")
    return next((kind for kind in kinds if machine_type.startswith(kind.machine_prefix)), None)


class Pieces:
    """A file-like reader over stream pieces, for the parser."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; none at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


def read_skeleton(container: FrameReader) -> Skeleton:
    """Parse the frames without pages; whole RAM sections are skipped.

    Raises:
        DataError: the file is damaged.
    """
    configuration: Configuration | None = None
    devices: list[DeviceSection] = []
    description: bytes | None = None
    index = container.index
    # A frame whose pages are all superseded has no runs either.
    pieces = (
        raw
        for _, raw in container.iter_frames(index.frames_without_runs())
        if not is_ram_section(raw, index.target_page_bytes)
    )
    for event in StreamReader(Pieces(pieces)).events():
        match event:
            case Configuration():
                configuration = event
            case Device():
                devices.append(event.section)
            case Description():
                description = event.text
            case _:
                pass
    return Skeleton(configuration=configuration, devices=tuple(devices), description=description)
