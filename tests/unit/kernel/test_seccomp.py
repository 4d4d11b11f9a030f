"""The evaluation of seccomp filters: what the kernel would answer, and "no" in doubt."""

from __future__ import annotations

import struct

import pytest

from stillframe.kernel.seccomp import AUDIT_ARCH_X86_64, allows

ALLOW, LOG, ERRNO, KILL, TRACE = 0x7FFF0000, 0x7FFC0000, 0x00050001, 0x80000000, 0x7FF00000
LD_ABS, LD_IMM, LDX_IMM, LD_MEM, ST, STX = 0x20, 0x00, 0x01, 0x60, 0x02, 0x03
JEQ, JGT, JGE, JSET, JA, RET, RET_A, TAX, TXA = 0x15, 0x25, 0x35, 0x45, 0x05, 0x06, 0x16, 0x07, 0x87
NR, ARCH, POINTER, ARGUMENT = 0, 4, 8, 16


def program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def answering(action: int) -> bytes:
    return program((RET, 0, 0, action))


@pytest.mark.parametrize(
    ("action", "expected"),
    [(ALLOW, True), (LOG, True), (ERRNO, False), (KILL, False), (TRACE, False), (0, False)],
)
def test_only_allow_and_log_let_a_call_through(action: int, expected: bool) -> None:
    assert allows(answering(action), 323) is expected


def test_the_call_number_and_architecture_decide() -> None:
    code = program(
        (LD_ABS, 0, 0, ARCH),
        (JEQ, 1, 0, AUDIT_ARCH_X86_64),
        (RET, 0, 0, KILL),
        (LD_ABS, 0, 0, NR),
        (JEQ, 0, 1, 323),
        (RET, 0, 0, ERRNO),
        (RET, 0, 0, ALLOW),
    )
    assert not allows(code, 323)
    assert allows(code, 3)


@pytest.mark.parametrize("half", [0, 1])
def test_arguments_are_seen_in_two_halves(half: int) -> None:
    code = program(
        (LD_ABS, 0, 0, ARGUMENT + 8 + 4 * half),
        (JEQ, 0, 1, 0x1234),
        (RET, 0, 0, ALLOW),
        (RET, 0, 0, KILL),
    )
    assert allows(code, 16, (7, 0x1234 << (32 * half)))
    assert not allows(code, 16, (7, 0x1235 << (32 * half)))


def test_the_instruction_pointer_is_seen() -> None:
    code = program((LD_ABS, 0, 0, POINTER), (JEQ, 0, 1, 0x77), (RET, 0, 0, ALLOW), (RET, 0, 0, 0))
    assert allows(code, 1, (), 0x77)
    assert not allows(code, 1, (), 0x78)


@pytest.mark.parametrize(
    ("jump", "value", "taken"),
    [
        (JGT, 5, True),
        (JGT, 6, False),
        (JGE, 6, True),
        (JGE, 7, False),
        (JSET, 2, True),
        (JSET, 1, False),
        (JEQ, 6, True),
    ],
)
def test_jumps(jump: int, value: int, taken: bool) -> None:
    code = program((LD_IMM, 0, 0, 6), (jump, 0, 1, value), (RET, 0, 0, ALLOW), (RET, 0, 0, KILL))
    assert allows(code, 1) is taken


@pytest.mark.parametrize(
    ("operation", "operand", "result"),
    [
        (0x04, 3, 9),  # ADD
        (0x14, 7, 0xFFFFFFFF),  # SUB
        (0x24, 3, 18),  # MUL
        (0x34, 4, 1),  # DIV
        (0x44, 9, 15),  # OR
        (0x54, 3, 2),  # AND
        (0x64, 2, 24),  # LSH
        (0x74, 1, 3),  # RSH
        (0x84, 0, 0xFFFFFFFA),  # NEG
        (0xA4, 5, 3),  # XOR
    ],
)
def test_arithmetic_is_of_32_bits(operation: int, operand: int, result: int) -> None:
    code = program(
        (LD_IMM, 0, 0, 6),
        (operation, 0, 0, operand),
        (JEQ, 0, 1, result),
        (RET, 0, 0, ALLOW),
        (RET, 0, 0, KILL),
    )
    assert allows(code, 1)


def test_memory_index_register_and_returned_accumulator() -> None:
    code = program(
        (LD_IMM, 0, 0, ALLOW),
        (ST, 0, 0, 3),
        (LDX_IMM, 0, 0, 9),
        (STX, 0, 0, 4),
        (TXA, 0, 0, 0),
        (TAX, 0, 0, 0),
        (JA, 0, 0, 1),
        (RET, 0, 0, KILL),
        (LD_MEM, 0, 0, 3),
        (RET_A, 0, 0, 0),
    )
    assert allows(code, 1)


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b"\x06",
        program((JA, 0, 0, 100)),  # behind its end
        program((LD_ABS, 0, 0, 4096), (RET, 0, 0, ALLOW)),
        program((LD_MEM, 0, 0, 99), (RET, 0, 0, ALLOW)),
        program((LD_IMM, 0, 0, 1), (0x34, 0, 0, 0), (RET, 0, 0, ALLOW)),  # a division by 0
        program((0xF4, 0, 0, 0), (RET, 0, 0, ALLOW)),
        program((0xFFFF, 0, 0, 0), (RET, 0, 0, ALLOW)),
        program((LD_IMM, 0, 0, 1)),  # no return
    ],
)
def test_what_is_not_understood_counts_as_no(code: bytes) -> None:
    assert not allows(code, 1)
