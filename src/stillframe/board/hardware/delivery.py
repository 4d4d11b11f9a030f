"""Delivery of interrupts and exceptions to the guest's handlers, through its descriptor table.

Unicorn only reports exceptions and has no interrupt controller, so this module delivers both (Intel
SDM 3A, 6.14, 64-bit mode). The board runs privilege level 0 only.
"""

from __future__ import annotations

import contextlib
import struct

from unicorn import x86_const as x86

from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.engine import Engine
from stillframe.board.hardware.registers import (
    FLAG_INTERRUPTS,
    FLAG_NESTED,
    FLAG_RESUME,
    FLAG_TRAP,
)
from stillframe.board.memory.guest_ram import GuestRam

EXCEPTIONS = 32
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})  # Intel SDM 3A, table 6-1
_GATE_BYTES = 16
_INTERRUPT_GATE, _TRAP_GATE = 0xE, 0xF
_PRESENT = 1 << 47
_HALT = 0xF4
_STACK_TABLE_OFFSET = 0x24
"""Offset of IST 1 in the task state segment (Intel SDM 3A, 8.7)."""
_WORD = struct.Struct("<Q")


class CannotDeliver(Exception):  # noqa: N818 - what the guest's panic is called after
    """The guest cannot take the interrupt or exception. The text says why, in a few words."""


class GuestMemory:
    """Guest memory as one vCPU addresses it: linear addresses, translated by its page tables."""

    def __init__(self, engine: Engine, space: AddressSpace) -> None:
        self._engine = engine
        self._space = space

    def read_word(self, address: int) -> int:
        """Return eight bytes, aligned.

        Raises:
            CannotDeliver: no RAM is there.
        """
        ram, offset = self._locate(address, write=False)
        value: int = _WORD.unpack(ram.read(offset, _WORD.size))[0]
        return value

    def write_words(self, address: int, words: list[int]) -> None:
        """Write words of eight bytes, aligned; wait while a protected page is saved.

        Raises:
            CannotDeliver: no RAM is there; some words may be written.
        """
        for word in words:
            ram, offset = self._locate(address, write=True)
            ram.write(offset, _WORD.pack(word))
            address += _WORD.size

    def _locate(self, address: int, *, write: bool) -> tuple[GuestRam, int]:
        gpa = self._engine.translate(address, write=write)
        place = None if gpa is None else self._space.locate(gpa, _WORD.size)
        if place is None:
            raise CannotDeliver(f"no RAM at {address:#x}")
        return place


def deliver(engine: Engine, memory: GuestMemory, vector: int, error_code: int) -> None:
    """Make the guest's handler run next. The engine must not be running.

    Args:
        error_code: pushed for the exceptions that have one.

    Raises:
        CannotDeliver: the guest cannot go on.
    """
    code = engine.get(x86.UC_X86_REG_CS)
    if code & 3:
        raise CannotDeliver(f"at privilege level {code & 3}, the board has level 0 only")
    handler, selector, kind, stack_number = _gate(engine, memory, vector)
    flags = engine.get(x86.UC_X86_REG_RFLAGS)
    old_stack = engine.get(x86.UC_X86_REG_RSP)
    stack = old_stack
    if stack_number:
        task = engine.get(x86.UC_X86_REG_TR)[1]
        stack = _unaligned_word(memory, task + _STACK_TABLE_OFFSET + 8 * (stack_number - 1))
    frame = [engine.rip, code, flags, old_stack, engine.get(x86.UC_X86_REG_SS)]
    if vector in _WITH_ERROR_CODE:
        frame.insert(0, error_code)
    stack = (stack & ~0xF) - len(frame) * _WORD.size
    memory.write_words(stack & 0xFFFFFFFFFFFFFFFF, frame)
    engine.set(x86.UC_X86_REG_RSP, stack & 0xFFFFFFFFFFFFFFFF)
    cleared = FLAG_TRAP | FLAG_NESTED | FLAG_RESUME
    if kind == _INTERRUPT_GATE:
        cleared |= FLAG_INTERRUPTS
    engine.set(x86.UC_X86_REG_RFLAGS, flags & ~cleared)
    if selector != code:
        engine.set(x86.UC_X86_REG_CS, selector)
    engine.rip = handler


def pass_over_halt(engine: Engine, memory: GuestMemory) -> None:
    """Step over ``hlt`` if it is the guest's next instruction, for an interrupt that would wake it.

    A processor takes no interrupt between ``sti`` and ``hlt`` (Intel SDM 2B, STI), so that the
    guest sleeps through none; the engine may stop there.
    """
    with contextlib.suppress(CannotDeliver):
        if _unaligned_word(memory, engine.rip) & 0xFF == _HALT:
            engine.rip += 1


def _gate(engine: Engine, memory: GuestMemory, vector: int) -> tuple[int, int, int, int]:
    """Return handler, code selector, kind, and number of the interrupt stack."""
    _, base, limit, _ = engine.get(x86.UC_X86_REG_IDTR)
    at = vector * _GATE_BYTES
    if limit < at + _GATE_BYTES - 1:
        raise CannotDeliver("the guest's interrupt table has no entry for it")
    low = _unaligned_word(memory, base + at)
    high = _unaligned_word(memory, base + at + 8)
    kind = low >> 40 & 0xF
    if not low & _PRESENT or kind not in (_INTERRUPT_GATE, _TRAP_GATE):
        raise CannotDeliver("the guest's interrupt table has no gate for it")
    handler = low & 0xFFFF | low >> 48 << 16 | (high & 0xFFFFFFFF) << 32
    return handler, low >> 16 & 0xFFFF, kind, low >> 32 & 7


def _unaligned_word(memory: GuestMemory, address: int) -> int:
    start, shift = address & ~7, (address & 7) * 8
    word = memory.read_word(start)
    if shift:
        word |= memory.read_word(start + 8) << 64
    return word >> shift & 0xFFFFFFFFFFFFFFFF
