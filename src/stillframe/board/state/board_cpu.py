"""The part of a board's saved state that exports need: the registers in its ``cpu`` sections, and
the addresses of its RAM.

The layout is that of ``board/hardware/registers.py`` (``REGISTERS``, version 1);
``tests/unit/board/state/test_board_cpu.py`` compares the two. It lacks the hidden parts of segment
registers, which are reported as those of flat 64-bit segments, as they are when the board starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from stillframe.errors import DataError
from stillframe.model import BlockRecord, GpaRange
from stillframe.vmstate.x86_cpu import FPU_REGISTER_COUNT, X86CpuState, X86Segment

BOARD_MACHINE_PREFIX = "stillframe-board-"
"""The prefix of all boards' machine types."""

_GPA = {"board.ram": 0, "board.vram": 0xE0000000, "board.dimm0": 4 << 30}
"""``docs/design/board.md``, "Address space"."""

_VERSION = 1
_LAYOUT = Struct(
    ">16QQQ"  # general registers, RIP, RFLAGS
    "3HQQ3H8Q8H"  # FPU: control, status, tag; last instruction; mantissas, exponents
    "6HQQ"  # selectors, bases of FS and GS
    "IQIIIQIIIQIIIQII"  # LDTR, TR, GDTR, IDTR
    "4QB6QI32Q"  # CR0, CR2, CR3, CR4, CR8; debug registers; MXCSR, XMM
    "11QBiI"  # MSRs; halted, exception, error code
)
_FLAT_LIMIT = 0xFFFFFFFF
_FLAT_CODE, _FLAT_DATA = 0xAF9B00, 0xCF9300
_TAG_EMPTY = 3


def parse_board_cpu(payload: bytes, version_id: int) -> X86CpuState:
    """Read the registers from the payload of a board's ``cpu`` section.

    Raises:
        DataError: the version or the length is not the expected one.
    """
    if version_id != _VERSION or len(payload) != _LAYOUT.size:
        raise DataError(
            f"the vCPU's state has version {version_id} and {len(payload)} bytes",
            why=f"a board's has version {_VERSION} and {_LAYOUT.size} bytes",
        )
    rest = list(_LAYOUT.unpack(payload))

    def take(count: int) -> list[int]:
        taken = rest[:count]
        del rest[:count]
        return taken

    regs, (eip, eflags, control, status, tags) = take(16), take(5)
    take(5)  # the last instruction of the FPU
    mantissas, exponents = take(8), take(8)
    selectors, (fs_base, gs_base) = take(6), take(2)
    ldt, tr, gdt, idt = (_table(*take(4)) for _ in range(4))
    cr0, cr2, cr3, cr4, _cr8, *dr, mxcsr = take(12)
    xmm, msrs = take(32), take(11)
    bases = (0, 0, 0, 0, fs_base, gs_base)
    kinds = (_FLAT_DATA, _FLAT_CODE, *[_FLAT_DATA] * 4)
    es, cs, ss, ds, fs, gs = (
        X86Segment(selector=selector, base=base, limit=_FLAT_LIMIT, flags=flags)
        for selector, base, flags in zip(selectors, bases, kinds, strict=True)
    )
    used = [tags >> 2 * n & _TAG_EMPTY != _TAG_EMPTY for n in range(FPU_REGISTER_COUNT)]
    return X86CpuState(
        regs=tuple(regs),
        eip=eip,
        eflags=eflags,
        hflags=0,
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
        sysenter_cs=msrs[6],
        sysenter_esp=msrs[7],
        sysenter_eip=msrs[8],
        cr0=cr0,
        cr2=cr2,
        cr3=cr3,
        cr4=cr4,
        dr=(*dr[:4], 0, 0, *dr[4:]),
        fpu_control=control,
        fpu_status=status,
        fpu_tag=sum(bit << n for n, bit in enumerate(used)),
        fpu_regs=tuple(
            mantissa.to_bytes(8, "little") + exponent.to_bytes(2, "little")
            for mantissa, exponent in zip(mantissas, exponents, strict=True)
        ),
        mxcsr=mxcsr,
        xmm=tuple(
            low.to_bytes(8, "little") + high.to_bytes(8, "little")
            for low, high in zip(xmm[::2], xmm[1::2], strict=True)
        ),
        efer=msrs[0],
        star=msrs[1],
        lstar=msrs[2],
        cstar=msrs[3],
        fmask=msrs[4],
        kernel_gs_base=msrs[5],
    )


def _table(selector: int, base: int, limit: int, flags: int) -> X86Segment:
    return X86Segment(selector=selector, base=base, limit=limit, flags=flags)


class SavedBoard:
    """The board's ``still.skeleton.SavedKind``."""

    machine_prefix = BOARD_MACHINE_PREFIX
    parse_cpu = staticmethod(parse_board_cpu)

    @staticmethod
    def memory_map(blocks: Sequence[BlockRecord]) -> tuple[GpaRange, ...]:
        """Return the guest-physical ranges of these blocks, ascending."""
        lengths = {block.idstr: block.used_length_bytes for block in blocks}
        return tuple(
            GpaRange(gpa=gpa, length_bytes=lengths[idstr], idstr=idstr, offset_bytes=0)
            for idstr, gpa in sorted(_GPA.items(), key=lambda item: item[1])
            if idstr in lengths
        )


SAVED = SavedBoard()
