"""A board's vCPU: what is read is what the board itself saves."""

from __future__ import annotations

import pytest

from stillframe.board.hardware.layout import CODE_SELECTOR, DATA_SELECTOR, GDT_GPA
from stillframe.board.hardware.registers import GDT_LIMIT, REGISTERS, Registers
from stillframe.board.state.board_cpu import parse_board_cpu
from stillframe.board.state.fields import save_state
from stillframe.errors import DataError
from stillframe.vmstate.x86_cpu import X86Segment


def saved() -> Registers:
    registers = Registers()
    registers.regs[:] = range(100, 116)
    registers.eip, registers.eflags = 0x100000, 0x246
    registers.fp_mantissas[:] = range(8)
    registers.fp_exponents[:] = range(10, 18)
    registers.fptag = 0xFFFC  # the first one is in use
    registers.fs_base, registers.gs_base = 0x7000, 0x8000
    registers.cr3, registers.cr2 = 0x5000, 0xDEAD
    registers.dr[:] = [1, 2, 3, 4, 6, 7]
    registers.xmm[:] = range(32)
    registers.efer, registers.kernelgsbase, registers.sysenter_eip = 0xD01, 0x9000, 0x42
    return registers


def test_what_the_board_saves_is_read() -> None:
    registers = saved()
    state = parse_board_cpu(save_state(REGISTERS, registers), REGISTERS.version_id)
    assert state.regs == tuple(range(100, 116))
    assert (state.eip, state.eflags, state.cr2, state.cr3) == (0x100000, 0x246, 0xDEAD, 0x5000)
    assert (state.cr0, state.cr4, state.mxcsr) == (registers.cr0, registers.cr4, registers.mxcsr)
    assert (state.cs.selector, state.cs.flags) == (CODE_SELECTOR, 0xAF9B00)
    assert [part.selector for part in (state.es, state.ss, state.ds)] == [DATA_SELECTOR] * 3
    assert (state.fs.base, state.gs.base) == (0x7000, 0x8000)
    assert state.gdt == X86Segment(selector=0, base=GDT_GPA, limit=GDT_LIMIT, flags=0)
    assert state.dr == (1, 2, 3, 4, 0, 0, 6, 7)
    assert (state.fpu_control, state.fpu_tag) == (registers.fpuc, 1)
    assert state.fpu_regs[7] == (7).to_bytes(8, "little") + (17).to_bytes(2, "little")
    assert state.xmm[15] == (30).to_bytes(8, "little") + (31).to_bytes(8, "little")
    assert (state.efer, state.kernel_gs_base, state.sysenter_eip) == (0xD01, 0x9000, 0x42)


@pytest.mark.parametrize(("extra", "version"), [(b"", 2), (b"x", 1)])
def test_another_version_or_length(extra: bytes, version: int) -> None:
    with pytest.raises(DataError, match="the vCPU's state has version"):
        parse_board_cpu(save_state(REGISTERS, saved()) + extra, version)
