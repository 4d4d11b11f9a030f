"""The entropy source: random words, and random bytes that it writes into RAM by DMA
(ports 0x520 to 0x52c, line 6)."""

from __future__ import annotations

import os
from collections.abc import Callable

from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.device_thread import Finish, Work
from stillframe.board.hardware.interrupts import LINE_ENTROPY, InterruptLines
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.fields import StateDescription, u32, u64

_PIECE_BYTES = 16 << 10
_PAGE_BYTES = 4096
_MASK = (1 << 64) - 1


class Entropy:
    """The device. Guarded by the board lock.

    ``address``: as the guest set it. ``next_gpa``, ``left_bytes``: what is still to be filled. The
    device drops bytes for addresses without RAM.
    """

    WORD, ADDRESS_LOW, ADDRESS_HIGH, LENGTH = 0, 4, 8, 12
    COUNT = 16

    def __init__(
        self, space: AddressSpace, lines: InterruptLines, kick: Callable[[], None]
    ) -> None:
        """
        Args:
            kick: called when there is work for the device's thread.
        """
        self._space = space
        self._lines = lines
        self._kick = kick
        self._generation = 0
        self.reset()

    def reset(self) -> None:
        self.address = self.next_gpa = 0
        self.left_bytes = 0
        # A piece in flight no longer counts.
        self._generation += 1

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset == self.WORD:
            return int.from_bytes(os.urandom(4), "little")
        if offset == self.LENGTH:
            return self.left_bytes
        return 0

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if offset == self.ADDRESS_LOW:
            self.address = self.address >> 32 << 32 | value
        elif offset == self.ADDRESS_HIGH:
            self.address = value << 32 | self.address & 0xFFFFFFFF
        elif offset == self.LENGTH and not self.left_bytes:
            self.next_gpa = self.address
            self.left_bytes = value
            self._kick()

    def next_work(self, *, running: bool) -> Work | None:
        if not running or not self.left_bytes:
            return None
        gpa = self.next_gpa
        # End at a page boundary, so that a piece is all in RAM or all outside.
        length_bytes = min(self.left_bytes, _PIECE_BYTES - gpa % _PAGE_BYTES)
        place = self._space.locate(gpa, length_bytes)
        if place is None:
            length_bytes = min(self.left_bytes, _PAGE_BYTES - gpa % _PAGE_BYTES)
            place = self._space.locate(gpa, length_bytes)
        generation = self._generation

        def fill() -> Finish:
            if place is not None:
                _fill(*place, length_bytes)
            return lambda: self._filled(generation, length_bytes)

        return fill

    def _filled(self, generation: int, length_bytes: int) -> None:
        if generation != self._generation:
            return
        self.next_gpa = (self.next_gpa + length_bytes) & _MASK
        self.left_bytes -= length_bytes
        if not self.left_bytes:
            self._lines.raise_line(LINE_ENTROPY)


def _fill(ram: GuestRam, offset_bytes: int, length_bytes: int) -> None:
    ram.write(offset_bytes, os.urandom(length_bytes))


ENTROPY = StateDescription(
    name="entropy",
    version_id=1,
    minimum_version_id=1,
    fields=(u64("address"), u64("next_gpa"), u32("left_bytes")),
)
