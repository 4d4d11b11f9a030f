"""Registers of an x86-64 vCPU, from the payload of a ``cpu`` section.

Source: QEMU ``target/i386/machine.c``, ``vmstate_x86_cpu``, versions 11 and 12, x86-64 target
(``CPU_NB_REGS`` 16, 64-bit ``target_ulong``): the same first fields in QEMU 6 to 10.2. The rest
(MSRs, MTRRs, AVX state, subsections) is not parsed.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from stillframe.errors import DataError

CPU_IDSTR = "cpu"
OLDEST_VERSION = 11
NEWEST_VERSION = 12
REGISTER_COUNT = 16
FPU_REGISTER_COUNT = 8

_GENERAL = Struct(">16QQQI")
_FPU = Struct(">4H")
_FPU_REGISTER = Struct(">QH")
_SEGMENT = Struct(">IQII")
_SYSENTER = Struct(">IQQ")
_CONTROL = Struct(">4Q8QiI")
_XMM = Struct(">QQ")
_SYSTEM = Struct(">6Q")

_A20_MASKS = frozenset({-1, ~(1 << 20)})
"""A20 enabled or masked; no x86-64 CPU has any other value."""


class X86Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One segment or descriptor table register.

    ``flags``: the descriptor's second word, as QEMU keeps it (access rights in bits 8 to 15,
    granularity and size in bits 20 to 23).
    """

    selector: int
    base: int
    limit: int
    flags: int


class X86CpuState(msgspec.Struct, frozen=True, kw_only=True):
    """One vCPU's registers.

    ``regs``: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    ``fpu_tag``: abridged, bit n is set if physical register n is in use, as FXSAVE has it.
    ``fpu_status``: with the stack top in bits 11 to 13.
    ``fpu_regs``: physical registers 0 to 7, ten bytes each, as in guest memory (little-endian).
    ``xmm``: XMM0 to XMM15, 16 bytes each, as in guest memory.
    """

    regs: tuple[int, ...]
    eip: int
    eflags: int
    hflags: int
    es: X86Segment
    cs: X86Segment
    ss: X86Segment
    ds: X86Segment
    fs: X86Segment
    gs: X86Segment
    ldt: X86Segment
    tr: X86Segment
    gdt: X86Segment
    idt: X86Segment
    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    dr: tuple[int, ...]
    fpu_control: int
    fpu_status: int
    fpu_tag: int
    fpu_regs: tuple[bytes, ...]
    mxcsr: int
    xmm: tuple[bytes, ...]
    efer: int
    star: int
    lstar: int
    cstar: int
    fmask: int
    kernel_gs_base: int


class _Fields:
    """A reader of consecutive structures from the payload."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._position = 0

    def take(self, fields: Struct) -> tuple[int, ...]:
        end = self._position + fields.size
        if end > len(self._payload):
            raise DataError(
                "the vCPU's state is too short",
                why=f"its {len(self._payload)} bytes are not an x86-64 CPU's",
                offset_bytes=self._position,
            )
        values = fields.unpack_from(self._payload, self._position)
        self._position = end
        return values

    def segment(self) -> X86Segment:
        selector, base, limit, flags = self.take(_SEGMENT)
        return X86Segment(selector=selector, base=base, limit=limit, flags=flags)

    def fpu_register(self) -> bytes:
        mantissa, exponent = self.take(_FPU_REGISTER)
        return mantissa.to_bytes(8, "little") + exponent.to_bytes(2, "little")

    def xmm_register(self) -> bytes:
        low, high = self.take(_XMM)
        return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def parse_x86_cpu(payload: bytes, version_id: int) -> X86CpuState:
    """Read the registers from a section named ``cpu`` of an x86-64 VM.

    Args:
        payload: the section's payload.
        version_id: the section's version.

    Raises:
        DataError: another version, too short, or not an x86-64 CPU.
    """
    if not OLDEST_VERSION <= version_id <= NEWEST_VERSION:
        raise DataError(
            f"the vCPU's state has version {version_id}",
            why=f"only {OLDEST_VERSION} to {NEWEST_VERSION} are known",
        )
    fields = _Fields(payload)
    *regs, eip, eflags, hflags = fields.take(_GENERAL)
    fpu_control, fpu_status, fpu_tag, fpu_format = fields.take(_FPU)
    fpu_regs = tuple(fields.fpu_register() for _ in range(FPU_REGISTER_COUNT))
    es, cs, ss, ds, fs, gs = (fields.segment() for _ in range(6))
    ldt, tr, gdt, idt = (fields.segment() for _ in range(4))
    sysenter_cs, sysenter_esp, sysenter_eip = fields.take(_SYSENTER)
    cr0, cr2, cr3, cr4, *dr, a20_mask, mxcsr = fields.take(_CONTROL)
    if fpu_format != 0 or a20_mask not in _A20_MASKS:
        raise DataError("the vCPU's state is not an x86-64 CPU's")
    xmm = tuple(fields.xmm_register() for _ in range(REGISTER_COUNT))
    efer, star, lstar, cstar, fmask, kernel_gs_base = fields.take(_SYSTEM)
    return X86CpuState(
        regs=tuple(regs),
        eip=eip,
        eflags=eflags,
        hflags=hflags,
        es=es,
        cs=cs,
        ss=ss,
        ds=ds,
        fs=fs,
        gs=gs,
        ldt=ldt,
        tr=tr,
        gdt=gdt,
        idt=idt,
        sysenter_cs=sysenter_cs,
        sysenter_esp=sysenter_esp,
        sysenter_eip=sysenter_eip,
        cr0=cr0,
        cr2=cr2,
        cr3=cr3,
        cr4=cr4,
        dr=tuple(dr),
        fpu_control=fpu_control,
        fpu_status=fpu_status,
        fpu_tag=fpu_tag,
        fpu_regs=fpu_regs,
        mxcsr=mxcsr,
        xmm=xmm,
        efer=efer,
        star=star,
        lstar=lstar,
        cstar=cstar,
        fmask=fmask,
        kernel_gs_base=kernel_gs_base,
    )
