"""The vCPU's registers; a real QEMU's are in tests/integration/test_stream_qemu.py."""

from __future__ import annotations

from struct import pack

import pytest

from stillframe.errors import DataError
from stillframe.vmstate.x86_cpu import X86Segment, parse_x86_cpu


def payload(*, fpu_format: int = 0, a20: int = -1) -> bytes:
    segments = b"".join(pack(">IQII", i, 0x1000 * i, 0xFFFF, 0x9300) for i in range(10))
    fpu = b"".join(pack(">QH", 0x8000000000000000 + i, 0x3FFF) for i in range(8))
    xmm = b"".join(pack(">QQ", 2 * i, 2 * i + 1) for i in range(16))
    return (
        pack(">16QQQI", *range(16), 0xFFFF8000_00001000, 0x246, 7)
        + pack(">4H", 0x37F, 0x3800, 0xFF, fpu_format)
        + fpu
        + segments
        + pack(">IQQ", 1, 2, 3)
        + pack(">4Q8QiI", 0x80050033, 0xDEAD, 0x1000, 0x6F0, *range(8), a20, 0x1F80)
        + xmm
        + pack(">6Q", 0xD01, 11, 12, 13, 14, 15)
        + bytes(500)
    )


def test_fields() -> None:
    state = parse_x86_cpu(payload(), 12)
    assert state.regs == tuple(range(16))
    assert (state.eip, state.eflags, state.hflags) == (0xFFFF800000001000, 0x246, 7)
    assert state.es == X86Segment(selector=0, base=0, limit=0xFFFF, flags=0x9300)
    assert [s.selector for s in (state.cs, state.ss, state.ds, state.fs, state.gs)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert [s.selector for s in (state.ldt, state.tr, state.gdt, state.idt)] == [6, 7, 8, 9]
    assert (state.cr0, state.cr2, state.cr3, state.cr4) == (0x80050033, 0xDEAD, 0x1000, 0x6F0)
    assert state.dr == tuple(range(8))
    assert (state.fpu_control, state.fpu_status, state.fpu_tag) == (0x37F, 0x3800, 0xFF)
    assert state.fpu_regs[2] == bytes.fromhex("0200000000000080 ff3f")
    assert state.xmm[1] == (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert (state.mxcsr, state.efer, state.kernel_gs_base) == (0x1F80, 0xD01, 15)


def test_a20_may_be_masked() -> None:
    assert parse_x86_cpu(payload(a20=~(1 << 20)), 11).regs[15] == 15


@pytest.mark.parametrize("version", [0, 10, 13, 22])
def test_version(version: int) -> None:
    with pytest.raises(DataError, match="version"):
        parse_x86_cpu(payload(), version)


@pytest.mark.parametrize(
    "data",
    [b"", payload()[:600], payload(fpu_format=1), payload(a20=0), payload()[4:], b"\xff" * 2000],
)
def test_not_an_x86_64_cpu(data: bytes) -> None:
    with pytest.raises(DataError):
        parse_x86_cpu(data, 12)
