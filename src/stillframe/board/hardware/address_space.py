"""The guest-physical address space: where the guest sees its RAM blocks."""

from __future__ import annotations

from collections.abc import Callable

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.model import GpaRange


class AddressSpace:
    """The board's RAM blocks by guest-physical address. Blocks are only ever added."""

    def __init__(self) -> None:
        self._blocks: tuple[tuple[int, GuestRam], ...] = ()
        self._watchers: list[Callable[[int, GuestRam], None]] = []

    @property
    def rams(self) -> tuple[GuestRam, ...]:
        """The blocks, in the order in which they were added."""
        return tuple(ram for _, ram in self._blocks)

    def on_add(self, watcher: Callable[[int, GuestRam], None]) -> None:
        """Call ``watcher`` with each block and its address: those already there, and later ones."""
        self._watchers.append(watcher)
        for gpa, ram in self._blocks:
            watcher(gpa, ram)

    def add(self, gpa: int, ram: GuestRam) -> None:
        """Map a block for the guest. No vCPU may be running."""
        self._blocks = (*self._blocks, (gpa, ram))
        for watcher in self._watchers:
            watcher(gpa, ram)

    def locate(self, gpa: int, length_bytes: int) -> tuple[GuestRam, int] | None:
        """Return the block that holds all of a range, and the range's offset in it; else None."""
        for start, ram in self._blocks:
            if start <= gpa and gpa + length_bytes <= start + ram.length_bytes:
                return ram, gpa - start
        return None

    def memory_map(self) -> tuple[GpaRange, ...]:
        """Return all ranges, ascending by address."""
        return tuple(
            GpaRange(gpa=gpa, length_bytes=ram.length_bytes, idstr=ram.idstr, offset_bytes=0)
            for gpa, ram in sorted(self._blocks, key=lambda entry: entry[0])
        )
