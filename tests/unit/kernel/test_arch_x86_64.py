"""Registers and the safety frame, against the kernel's layout."""

from __future__ import annotations

import struct

import pytest

from stillframe.kernel import arch_x86_64 as arch

U64 = (1 << 64) - 1
ORDER = "r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp rip eflags"
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516


def registers(**changes: int) -> arch.Registers:
    content = struct.pack("=27Q", *range(1000, 1027))
    return {**arch.unpack_registers(content), "orig_rax": U64, "cs": 0x33, **changes}


def test_packing_is_the_inverse_of_unpacking() -> None:
    content = struct.pack("=27Q", *range(27))
    assert arch.pack_registers(arch.unpack_registers(content)) == content


def test_what_is_64_bit() -> None:
    assert arch.is_64_bit(arch.pack_registers(registers()))
    assert not arch.is_64_bit(arch.pack_registers(registers(cs=0x23)))
    assert not arch.is_64_bit(bytes(68))


def test_outside_a_system_call_nothing_changes() -> None:
    before = registers(rax=-ERESTARTSYS & U64)
    assert arch.resumed_by_sigreturn(before) == before


@pytest.mark.parametrize("code", [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND])
def test_an_interrupted_call_is_made_again(code: int) -> None:
    after = arch.resumed_by_sigreturn(registers(orig_rax=7, rax=-code & U64, rip=500))
    assert (after["rax"], after["rip"], after["orig_rax"]) == (7, 498, U64)


def test_a_call_with_a_restart_block_is_interrupted() -> None:
    before = registers(orig_rax=35, rax=-ERESTART_RESTARTBLOCK & U64, rip=500)
    after = arch.resumed_by_sigreturn(before)
    assert (after["rax"], after["rip"]) == (-4 & U64, 500)


def test_a_finished_call_keeps_its_result() -> None:
    after = arch.resumed_by_sigreturn(registers(orig_rax=0, rax=42, rip=500))
    assert (after["rax"], after["rip"]) == (42, 500)


def test_results() -> None:
    assert arch.result_of(registers(rax=3)) == 3
    assert arch.result_of(registers(rax=-1 & U64)) == -1


@pytest.mark.parametrize(
    ("features", "in_use", "length", "kept"),
    [
        (0x600E7 | 1 << 9, 0x7, 2696, 0xE7 | 1 << 9),
        (0x600E7, 0x7, 2688, 0xE7),
        (0x600E7, 0x60007, 11008, 0x600E7),  # it uses tiles
        (0xE7, 0x7, 11008, 0xE7),  # no AMX: as it is
    ],
)
def test_room_for_unused_tiles_is_left_out(
    features: int, in_use: int, length: int, kept: int
) -> None:
    xstate = bytearray(11008)
    struct.pack_into("=Q", xstate, 464, features)
    struct.pack_into("=Q", xstate, 512, in_use)
    start, frame = arch.safety_frame(registers(rsp=0x7FFF_0000_1238), bytes(xstate), 0, 1)
    (fp_address,) = struct.unpack_from("=Q", frame, 8 + 40 + 184)
    software = struct.unpack_from("=IIQI", frame, fp_address - start + 464)
    assert software == (0x46505853, length + 4, kept, length)
    assert struct.unpack_from("=I", frame, fp_address - start + length)[0] == 0x46505845


def test_the_safety_frame() -> None:
    before = registers(rsp=0x7FFF_0000_1238, rip=0x4444, rax=5, eflags=0x246, ss=0x2B)
    xstate = bytearray(b"\xab" * 1088)
    struct.pack_into("=Q", xstate, 464, 0xE7)
    start, frame = arch.safety_frame(before, bytes(xstate), 0x1234, 0x5555)
    end = start + len(frame)
    assert end <= before["rsp"] - 128, "it reaches into the red zone"
    assert struct.unpack_from("=Q", frame)[0] == 0x5555
    assert start % 16 == 0
    # struct ucontext behind the return address: flags, link, stack, then sigcontext.
    context = frame[8:]
    saved = dict(
        zip(
            ORDER.split(),
            struct.unpack_from("=18Q", context, 40),
            strict=True,
        )
    )
    assert saved == {name: before[name] for name in saved}
    assert struct.unpack_from("=HHHH", context, 40 + 144)[0] == 0x33
    (fp_address,) = struct.unpack_from("=Q", context, 40 + 184)
    assert fp_address % 64 == 0
    assert struct.unpack_from("=Q", context, 40 + 256)[0] == 0x1234
    fp = frame[fp_address - start :]
    assert len(fp) == len(xstate) + 4
    assert struct.unpack_from("=IIQI", fp, 464) == (0x46505853, len(xstate) + 4, 0xE7, len(xstate))
    assert struct.unpack_from("=I", fp, len(xstate))[0] == 0x46505845
    assert fp[:464] == xstate[:464]
