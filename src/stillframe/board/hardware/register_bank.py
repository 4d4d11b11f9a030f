"""Copies all registers between a Unicorn engine and ``Registers`` in batches: one call to read, two
to write (``unicorn.h``: uc_reg_read_batch, uc_reg_write_batch).

Reading register by register would take longer than the whole downtime should.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

from unicorn import x86_const as x86
from unicorn.unicorn_const import UC_ERR_OK, UC_ERR_READ_UNMAPPED
from unicorn.unicorn_py3 import Uc, UcError

from stillframe.board.hardware.registers import (
    FLOATING,
    GENERAL,
    MTRR_FIXED,
    MTRR_VARIABLE,
    XMM,
    Registers,
    Segment,
)


class _Table(ctypes.Structure):
    _fields_ = (  # uc_x86_mmr of x86.h
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _ModelSpecific(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint32), ("value", ctypes.c_uint64))  # uc_x86_msr


class _Floating(ctypes.Structure):
    _fields_ = (("mantissa", ctypes.c_uint64), ("exponent", ctypes.c_uint16))


class _Values(ctypes.Structure):
    """One cell per register; Unicorn writes up to eight bytes into a plain one."""

    _fields_ = (
        ("general", ctypes.c_uint64 * GENERAL),
        ("rip", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("tables", _Table * 4),
        ("control", ctypes.c_uint64 * 5),
        ("debug", ctypes.c_uint64 * 6),
        ("selectors", ctypes.c_uint64 * 6),
        ("bases", ctypes.c_uint64 * 2),
        ("fpu", ctypes.c_uint64 * 8),
        ("floating", _Floating * FLOATING),
        ("mxcsr", ctypes.c_uint64),
        ("xmm", ctypes.c_uint64 * (2 * XMM)),
        ("model_specific", _ModelSpecific * 13),
        ("mtrr_variable", _ModelSpecific * MTRR_VARIABLE),
        ("mtrr_fixed", _ModelSpecific * MTRR_FIXED),
    )


_GENERAL = (
    x86.UC_X86_REG_RAX,
    x86.UC_X86_REG_RCX,
    x86.UC_X86_REG_RDX,
    x86.UC_X86_REG_RBX,
    x86.UC_X86_REG_RSP,
    x86.UC_X86_REG_RBP,
    x86.UC_X86_REG_RSI,
    x86.UC_X86_REG_RDI,
    *range(x86.UC_X86_REG_R8, x86.UC_X86_REG_R15 + 1),
)
_TABLES = (x86.UC_X86_REG_LDTR, x86.UC_X86_REG_TR, x86.UC_X86_REG_GDTR, x86.UC_X86_REG_IDTR)
_CONTROL = (
    x86.UC_X86_REG_CR2,
    x86.UC_X86_REG_CR3,
    x86.UC_X86_REG_CR4,
    x86.UC_X86_REG_CR8,
    x86.UC_X86_REG_CR0,
)
_DEBUG = (
    *range(x86.UC_X86_REG_DR0, x86.UC_X86_REG_DR3 + 1),
    x86.UC_X86_REG_DR6,
    x86.UC_X86_REG_DR7,
)
_SELECTORS = (
    x86.UC_X86_REG_ES,
    x86.UC_X86_REG_CS,
    x86.UC_X86_REG_SS,
    x86.UC_X86_REG_DS,
    x86.UC_X86_REG_FS,
    x86.UC_X86_REG_GS,
)
_BASES = (x86.UC_X86_REG_FS_BASE, x86.UC_X86_REG_GS_BASE)
_FPU = {
    "fpuc": x86.UC_X86_REG_FPCW,
    "fpus": x86.UC_X86_REG_FPSW,
    "fptag": x86.UC_X86_REG_FPTAG,
    "fpip": x86.UC_X86_REG_FIP,
    "fpcs": x86.UC_X86_REG_FCS,
    "fpdp": x86.UC_X86_REG_FDP,
    "fpds": x86.UC_X86_REG_FDS,
    "fpop": x86.UC_X86_REG_FOP,
}
_MODEL_SPECIFIC = {  # Intel SDM 4, table 2-2
    "efer": 0xC0000080,
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "fmask": 0xC0000084,
    "kernelgsbase": 0xC0000102,
    "tsc_aux": 0xC0000103,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "pat": 0x277,
    "misc_enable": 0x1A0,
    "mtrr_default": 0x2FF,
}
_LISTS = {"regs": "general", "dr": "debug", "selectors": "selectors", "xmm": "xmm"}
"""List attributes of ``Registers``, and the arrays that hold their values."""
_NUMBERS = {
    "control": ("cr2", "cr3", "cr4", "cr8", "cr0"),
    "bases": ("fs_base", "gs_base"),
    "fpu": tuple(_FPU),
}
"""Arrays of values, and the attributes whose values they hold."""
_SEGMENT_PARTS = ("selector", "base", "limit", "flags")
_MTRR_VARIABLE = range(0x200, 0x200 + MTRR_VARIABLE)
_MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))


class _Batch:
    """Register numbers, and the addresses of their values."""

    def __init__(self, cells: Sequence[tuple[int, int]]) -> None:
        self.count = len(cells)
        self.numbers = (ctypes.c_int32 * self.count)(*(number for number, _ in cells))
        self.cells = (ctypes.c_void_p * self.count)(*(at for _, at in cells))


class RegisterBank:
    """The registers of one engine. The engine must not be running."""

    def __init__(self, engine: Uc) -> None:
        self._engine = engine
        self._values = values = _Values()
        first: list[tuple[int, int]] = []
        for name, numbers in (
            ("model_specific", tuple(_MODEL_SPECIFIC.values())),
            ("mtrr_variable", _MTRR_VARIABLE),
            ("mtrr_fixed", _MTRR_FIXED),
        ):
            for cell, number in zip(getattr(values, name), numbers, strict=True):
                cell.number = number
            first += ((x86.UC_X86_REG_MSR, at) for at in _each(values, name))
        for name, numbers in (
            ("control", _CONTROL),
            ("tables", _TABLES),
            ("debug", _DEBUG),
            ("general", _GENERAL),
            ("fpu", tuple(_FPU.values())),
            ("floating", range(x86.UC_X86_REG_FP0, x86.UC_X86_REG_FP7 + 1)),
        ):
            first += zip(numbers, _each(values, name), strict=True)
        first += zip(
            range(x86.UC_X86_REG_XMM0, x86.UC_X86_REG_XMM15 + 1),
            _each(values, "xmm")[::2],
            strict=True,
        )
        for name, number in (
            ("mxcsr", x86.UC_X86_REG_MXCSR),
            ("flags", x86.UC_X86_REG_RFLAGS),
            ("rip", x86.UC_X86_REG_RIP),
        ):
            first.append((number, _address(values, name)))
        # The bases of FS and GS come after the selectors, which set them.
        segments = [
            *zip(_SELECTORS, _each(values, "selectors"), strict=True),
            *zip(_BASES, _each(values, "bases"), strict=True),
        ]
        self._all = _Batch([*first, *segments])
        self._first = _Batch(first)
        self._segments = _Batch(segments)

    def read(self, registers: Registers) -> None:
        """Fill ``registers`` from the engine, except for what the engine does not know."""
        batch = self._all
        _check(self._engine._do_reg_read_batch(batch.numbers, batch.cells, batch.count))
        values = self._values
        for attribute, cell in _LISTS.items():
            getattr(registers, attribute)[:] = getattr(values, cell)
        for cell, attributes in _NUMBERS.items():
            for attribute, value in zip(attributes, getattr(values, cell), strict=True):
                setattr(registers, attribute, value)
        registers.eip, registers.eflags, registers.mxcsr = values.rip, values.flags, values.mxcsr
        for table, segment in zip(values.tables, _segments(registers), strict=True):
            for part in _SEGMENT_PARTS:
                setattr(segment, part, getattr(table, part))
        registers.fp_mantissas[:] = [cell.mantissa for cell in values.floating]
        registers.fp_exponents[:] = [cell.exponent for cell in values.floating]
        for name, cell in zip(_MODEL_SPECIFIC, values.model_specific, strict=True):
            setattr(registers, name, cell.value)
        registers.mtrr_variable[:] = [cell.value for cell in values.mtrr_variable]
        registers.mtrr_fixed[:] = [cell.value for cell in values.mtrr_fixed]

    def write(self, registers: Registers, readable: Callable[[int], bool]) -> None:
        """Fill the engine from ``registers``.

        Args:
            readable: whether the guest can read at a linear address, with all registers loaded but
                the segments. Unicorn loads segments from descriptors in the guest's memory, and
                would crash if these were not there.

        Raises:
            UcError: the engine rejects a register, or a segment's descriptor is not there.
        """
        values = self._values
        for attribute, cell in _LISTS.items():
            getattr(values, cell)[:] = getattr(registers, attribute)
        for cell, attributes in _NUMBERS.items():
            getattr(values, cell)[:] = [getattr(registers, name) for name in attributes]
        values.rip, values.flags, values.mxcsr = registers.eip, registers.eflags, registers.mxcsr
        for table, segment in zip(values.tables, _segments(registers), strict=True):
            for part in _SEGMENT_PARTS:
                setattr(table, part, getattr(segment, part))
        for place, cell in enumerate(values.floating):
            cell.mantissa = registers.fp_mantissas[place]
            cell.exponent = registers.fp_exponents[place]
        for name, cell in zip(_MODEL_SPECIFIC, values.model_specific, strict=True):
            cell.value = getattr(registers, name)
        for cell, value in (
            *zip(values.mtrr_variable, registers.mtrr_variable, strict=True),
            *zip(values.mtrr_fixed, registers.mtrr_fixed, strict=True),
        ):
            cell.value = value
        self._write(self._first)
        if not all(readable(at) for at in _descriptors(registers)):
            raise UcError(UC_ERR_READ_UNMAPPED)
        self._write(self._segments)

    def _write(self, batch: _Batch) -> None:
        _check(self._engine._do_reg_write_batch(batch.numbers, batch.cells, batch.count))


def _check(status: int) -> None:
    if status != UC_ERR_OK:
        raise UcError(status)


def _descriptors(registers: Registers) -> Iterator[int]:
    """Yield the first and last address of each segment descriptor (Intel SDM 3A, 3.4.2, 3.5.1)."""
    for selector in registers.selectors:
        if selector & ~3:
            table = registers.ldt if selector & 4 else registers.gdt
            for offset in (0, 7):
                yield (table.base + (selector & ~7) + offset) & 0xFFFFFFFFFFFFFFFF


def _segments(registers: Registers) -> tuple[Segment, ...]:
    return registers.ldt, registers.tr, registers.gdt, registers.idt


def _address(values: _Values, name: str) -> int:
    offset: int = getattr(_Values, name).offset
    return ctypes.addressof(values) + offset


def _each(values: _Values, name: str) -> list[int]:
    """Return the addresses of an array's elements."""
    elements = getattr(values, name)
    size = ctypes.sizeof(elements) // len(elements)
    return [_address(values, name) + place * size for place in range(len(elements))]
