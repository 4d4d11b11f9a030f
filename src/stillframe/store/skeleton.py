"""The stream without its pages: configuration, device sections, description."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from stillframe.store.container import Container
from stillframe.store.records import is_ram_section
from stillframe.vmstate.devices import DeviceSection
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Configuration, Description, Device


class Skeleton(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream holds besides RAM. ``description``: the vmdescription's JSON, if any."""

    configuration: Configuration | None
    devices: tuple[DeviceSection, ...]
    description: bytes | None


def machine_type_of(skeleton: Skeleton) -> str:
    """The machine type that a stream names; empty if it names none."""
    return skeleton.configuration.name if skeleton.configuration is not None else ""


class Pieces:
    """A reader, as the stream parser wants one, over pieces of a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


def read_skeleton(container: Container) -> Skeleton:
    """Parse the frames that hold no pages; a whole RAM section more or less does not matter.

    Raises:
        DataError: the file is damaged.
    """
    configuration: Configuration | None = None
    devices: list[DeviceSection] = []
    description: bytes | None = None
    index = container.index
    # A frame whose pages all come again later has no runs either.
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
