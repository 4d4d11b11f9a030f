"""A vCPU's registers as declared state, with the field names of QEMU's ``cpu`` section.

Source: QEMU ``target/i386/cpu.h`` (``CPUX86State``), ``target/i386/machine.c``
(``vmstate_x86_cpu``).
The state leaves out the hidden parts of segment registers, except the bases of FS and GS: Unicorn
reloads them from the guest's descriptor tables, as on any segment load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.board.hardware.layout import CODE_SELECTOR, DATA_SELECTOR, GDT_GPA
from stillframe.board.state.fields import (
    StateDescription,
    array,
    i32,
    struct,
    u8,
    u16,
    u32,
    u64,
)

GENERAL = 16
XMM = 16
FLOATING = 8
MTRR_VARIABLE, MTRR_FIXED = 2 * 8, 11
"""Bases and masks of variable ranges; fixed ranges (Intel SDM 3A, 12.11.2)."""
NO_EXCEPTION = -1
GDT_LIMIT = 3 * 8 - 1

RDI, RSI, RSP = 7, 6, 4
"""Indices in ``regs``: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15."""
ES, CS, SS, DS, FS, GS = range(6)
"""Indices in ``selectors``."""

FLAG_TRAP = 1 << 8
FLAG_INTERRUPTS = 1 << 9
FLAG_NESTED = 1 << 14
FLAG_RESUME = 1 << 16
_FLAGS_FIXED = 1 << 1

_CR0_PROTECTED, _CR0_EXTENSION = 1 << 0, 1 << 4
_CR4_OSFXSR = 1 << 9
_EFER_LONG = 1 << 8 | 1 << 10
_FPUC_RESET = 0x037F
_FPTAG_EMPTY = 0xFFFF
_MXCSR_RESET = 0x1F80
_DR6_RESET = 0xFFFF0FF0
_DR7_RESET = 0x400
_PAT_RESET = 0x0007040600070406


class Segment:
    """A descriptor table register, or LDTR or TR with its hidden part."""

    def __init__(self) -> None:
        self.selector = self.limit = self.flags = 0
        self.base = 0


class Registers:
    """All registers of one vCPU. At first, and after ``reset``, they have the boot protocol's
    values, except those that ``start_at`` sets.

    ``halted``: the vCPU waits for an interrupt. ``exception``: a vector yet to be delivered, or
    ``NO_EXCEPTION``; ``error_code`` is its error code. ``before_save`` and ``after_load`` run
    around saving and loading, since the vCPU keeps its registers in its engine.
    """

    def __init__(self) -> None:
        self.before_save: Callable[[], None] = _nothing
        self.after_load: Callable[[], None] = _nothing
        self.regs = [0] * GENERAL
        self.selectors = [0] * 6
        self.fp_mantissas = [0] * FLOATING
        self.fp_exponents = [0] * FLOATING
        self.ldt, self.tr, self.gdt, self.idt = (Segment() for _ in range(4))
        self.dr = [0] * 6
        self.xmm = [0] * (2 * XMM)
        self.mtrr_variable = [0] * MTRR_VARIABLE
        self.mtrr_fixed = [0] * MTRR_FIXED
        self.reset()

    def reset(self) -> None:
        self.regs[:] = [0] * GENERAL
        self.eip = 0
        self.eflags = _FLAGS_FIXED
        self.selectors[:] = [DATA_SELECTOR] * 6
        self.selectors[CS] = CODE_SELECTOR
        self.fs_base = self.gs_base = 0
        for segment in (self.ldt, self.tr, self.gdt, self.idt):
            segment.selector = segment.base = segment.limit = segment.flags = 0
        self.gdt.base, self.gdt.limit = GDT_GPA, GDT_LIMIT
        self.cr0 = _CR0_PROTECTED | _CR0_EXTENSION
        self.cr2 = self.cr3 = self.cr8 = 0
        self.cr4 = _CR4_OSFXSR
        self.dr[:] = [0, 0, 0, 0, _DR6_RESET, _DR7_RESET]
        self.fpuc, self.fpus, self.fptag = _FPUC_RESET, 0, _FPTAG_EMPTY
        self.fpip = self.fpdp = 0
        self.fpcs = self.fpds = self.fpop = 0
        self.fp_mantissas[:] = self.fp_exponents[:] = [0] * FLOATING
        self.mxcsr = _MXCSR_RESET
        self.xmm[:] = [0] * (2 * XMM)
        self.efer = _EFER_LONG
        self.star = self.lstar = self.cstar = self.fmask = self.kernelgsbase = 0
        self.sysenter_cs = self.sysenter_esp = self.sysenter_eip = 0
        self.pat = _PAT_RESET
        self.tsc_aux = 0
        self.forget_platform()
        self.halted = 0
        self.exception = NO_EXCEPTION
        self.error_code = 0

    def forget_platform(self) -> None:
        """Reset what subsection ``cpu/platform`` holds."""
        self.misc_enable = self.mtrr_default = 0
        self.mtrr_variable[:] = [0] * MTRR_VARIABLE
        self.mtrr_fixed[:] = [0] * MTRR_FIXED

    def start_at(self, entry: int, stack: int, arguments: Sequence[int]) -> None:
        """Set the registers that a vCPU starts with.

        Args:
            entry: the guest's entry point.
            stack: top of the vCPU's stack.
            arguments: for RDI and RSI.
        """
        self.eip = entry
        self.regs[RSP] = stack
        self.regs[RDI], self.regs[RSI] = arguments


def _nothing() -> None:
    return None


def _save(registers: Registers) -> None:
    registers.before_save()


def _loaded(registers: Registers, version_id: int) -> None:
    if registers.halted > 1:
        raise ValueError(f"halted is {registers.halted}")
    if not NO_EXCEPTION <= registers.exception <= 0xFF:
        raise ValueError(f"there is no exception {registers.exception}")
    registers.after_load()


def _forget(registers: Registers) -> None:
    registers.forget_platform()


def _is_set(registers: Registers) -> bool:
    return any(
        (
            registers.misc_enable,
            registers.mtrr_default,
            *registers.mtrr_variable,
            *registers.mtrr_fixed,
        )
    )


_PLATFORM = StateDescription(
    name="cpu/platform",
    version_id=1,
    minimum_version_id=1,
    fields=(
        u64("misc_enable"),
        u64("mtrr_default"),
        array("mtrr_variable", u64, MTRR_VARIABLE),
        array("mtrr_fixed", u64, MTRR_FIXED),
    ),
    needed=_is_set,
)

_SEGMENT = StateDescription(
    name="segment",
    version_id=1,
    minimum_version_id=1,
    fields=(u32("selector"), u64("base"), u32("limit"), u32("flags")),
)

REGISTERS = StateDescription(
    name="cpu",
    version_id=1,
    minimum_version_id=1,
    fields=(
        array("regs", u64, GENERAL),
        u64("eip"),
        u64("eflags"),
        u16("fpuc"),
        u16("fpus"),
        u16("fptag"),
        u64("fpip"),
        u64("fpdp"),
        u16("fpcs"),
        u16("fpds"),
        u16("fpop"),
        array("fp_mantissas", u64, FLOATING),
        array("fp_exponents", u16, FLOATING),
        array("selectors", u16, 6),
        u64("fs_base"),
        u64("gs_base"),
        struct("ldt", _SEGMENT),
        struct("tr", _SEGMENT),
        struct("gdt", _SEGMENT),
        struct("idt", _SEGMENT),
        u64("cr0"),
        u64("cr2"),
        u64("cr3"),
        u64("cr4"),
        u8("cr8"),
        array("dr", u64, 6),
        u32("mxcsr"),
        array("xmm", u64, 2 * XMM),
        u64("efer"),
        u64("star"),
        u64("lstar"),
        u64("cstar"),
        u64("fmask"),
        u64("kernelgsbase"),
        u64("sysenter_cs"),
        u64("sysenter_esp"),
        u64("sysenter_eip"),
        u64("pat"),
        u64("tsc_aux"),
        u8("halted"),
        i32("exception"),
        u32("error_code"),
    ),
    subsections=(_PLATFORM,),
    pre_save=_save,
    pre_load=_forget,
    post_load=_loaded,
)
