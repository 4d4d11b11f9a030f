"""The verdict of a process's own seccomp filters on a system call.

A wrong guess kills the VM, so the filters' BPF is evaluated before anything is injected. Source:
Linux ``Documentation/userspace-api/seccomp_filter.rst``, ``include/uapi/linux/filter.h``.
"""

from __future__ import annotations

import struct

AUDIT_ARCH_X86_64 = 0xC000003E
_ACTION_LOG = 0x7FFC0000
_ACTION_ALLOW = 0x7FFF0000
_ACTION_MASK = 0xFFFF0000
_INSTRUCTION = struct.Struct("=HBBI")
_MEMORY_WORDS = 16
_U32 = 0xFFFFFFFF


def allows(program: bytes, call: int, arguments: tuple[int, ...] = (), pointer: int = 0) -> bool:
    """Return whether one filter allows system call number ``call`` (x86-64).

    Args:
        program: classic BPF, 8 bytes per instruction, as PTRACE_SECCOMP_GET_FILTER returns it.
        arguments: the call's arguments, unsigned.
        pointer: the instruction pointer of the call.

    Anything that the evaluation does not know counts as "no".
    """
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", call, AUDIT_ARCH_X86_64, pointer, *padded)
    try:
        action = _run(program, data) & _ACTION_MASK
    except (_UnknownInstructionError, struct.error, IndexError, ZeroDivisionError):
        return False
    return action in (_ACTION_ALLOW, _ACTION_LOG)


class _UnknownInstructionError(Exception):
    pass


def _run(program: bytes, data: bytes) -> int:
    instructions = list(_INSTRUCTION.iter_unpack(program))
    accumulator = index = at = 0
    memory = [0] * _MEMORY_WORDS
    while True:
        code, on_true, on_false, k = instructions[at]
        at += 1  # jumps only go forward, so the loop ends
        kind = code & 7
        if kind == 6:  # RET
            return accumulator if code & 0x18 == 0x10 else k
        if kind == 0:  # LD
            accumulator = _load(code, k, memory, data)
        elif kind == 1:  # LDX
            index = _load(code, k, memory, data)
        elif kind == 2:  # ST
            memory[k] = accumulator
        elif kind == 3:  # STX
            memory[k] = index
        elif kind == 4:  # ALU
            accumulator = _alu(code & 0xF0, accumulator, index if code & 8 else k)
        elif kind == 5:  # JMP
            if code & 0xF0 == 0:
                at += k
            else:
                taken = _jump(code & 0xF0, accumulator, index if code & 8 else k)
                at += on_true if taken else on_false
        elif code & 0xF8 == 0:  # MISC TAX
            index = accumulator
        elif code & 0xF8 == 0x80:  # MISC TXA
            accumulator = index
        else:
            raise _UnknownInstructionError(code)


def _load(code: int, k: int, memory: list[int], data: bytes) -> int:
    mode = code & 0xE0
    if mode == 0x20:  # ABS, a 32-bit word of struct seccomp_data
        return int(struct.unpack_from("=I", data, k)[0])
    if mode == 0:  # IMM
        return k
    if mode == 0x60:  # MEM
        return memory[k]
    if mode == 0x80:  # LEN
        return len(data)
    raise _UnknownInstructionError(code)


def _alu(operation: int, left: int, right: int) -> int:
    if operation == 0x80:  # NEG
        return -left & _U32
    results = {
        0x00: lambda: left + right,
        0x10: lambda: left - right,
        0x20: lambda: left * right,
        0x30: lambda: left // right,
        0x40: lambda: left | right,
        0x50: lambda: left & right,
        0x60: lambda: left << (right & 31),
        0x70: lambda: left >> (right & 31),
        0x90: lambda: left % right,
        0xA0: lambda: left ^ right,
    }
    if operation not in results:
        raise _UnknownInstructionError(operation)
    return results[operation]() & _U32


def _jump(operation: int, left: int, right: int) -> bool:
    if operation == 0x10:
        return left == right
    if operation == 0x20:
        return left > right
    if operation == 0x30:
        return left >= right
    if operation == 0x40:
        return bool(left & right)
    raise _UnknownInstructionError(operation)
