"""x86-64: register layout, system call numbers, and the frame that makes injection safe.

The frame is a signal frame below the thread's red zone. If the tracer dies after the registers were
set, the thread itself returns through ``__restore_rt`` and rt_sigreturn(2) to exactly where it was;
until the registers are set, nothing has changed. Source: Linux ``arch/x86/include/asm/sigframe.h``,
``arch/x86/kernel/signal_64.c``, ``arch/x86/kernel/fpu/signal.c``; System V ABI (red zone). Another
architecture is another module with the same names.
"""

from __future__ import annotations

import struct
from typing import Final

SYS_CLOSE: Final = 3
SYS_RT_SIGRETURN: Final = 15
SYS_IOCTL: Final = 16
SYS_MADVISE: Final = 28
SYS_RECVMSG: Final = 47
SYS_SOCKETPAIR: Final = 53
SYS_USERFAULTFD: Final = 323

_REGISTERS = struct.Struct("=27Q")
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
    *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_RED_ZONE_BYTES = 128
_U64 = (1 << 64) - 1
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_EINTR = 4
_SYSCALL_LENGTH = 2
_FP_XSTATE_MAGIC1, _FP_XSTATE_MAGIC2 = 0x46505853, 0x46505845
_FX_SOFTWARE_OFFSET = 464
_XSTATE_BV_OFFSET = 512
_AMX_FEATURES, _PKRU_FEATURE = 3 << 17, 1 << 9
# End of the features before AMX; all processors with AMX have this layout.
_END_OF_AVX512, _END_OF_PKRU = 2688, 2696
_UC_FLAGS = 0x1 | 0x2 | 0x4  # FP_XSTATE, SIGCONTEXT_SS, STRICT_RESTORE_SS
_SS_FLAGS_INVALID = 0x7FFFFFFF  # makes rt_sigreturn leave the alternate stack as it is

GADGETS: Final = (
    b"\x0f\x05\xc3",  # syscall; ret
    b"\x0f\x05\x48\x3d\x01\xf0\xff\xff\x73",  # syscall; cmp $-4095,%rax; jae …; ret (glibc)
)
RESTORERS: Final = (
    b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",  # mov $15,%rax; syscall (glibc, musl)
    b"\xb8\x0f\x00\x00\x00\x0f\x05",  # mov $15,%eax; syscall
)

Registers = dict[str, int]


def unpack_registers(content: bytes) -> Registers:
    """Return the registers of a 64-bit thread's NT_PRSTATUS, by name."""
    return dict(zip(_NAMES, _REGISTERS.unpack(content[: _REGISTERS.size]), strict=True))


def pack_registers(registers: Registers) -> bytes:
    return _REGISTERS.pack(*(registers[name] & _U64 for name in _NAMES))


def is_64_bit(content: bytes) -> bool:
    return len(content) == _REGISTERS.size and unpack_registers(content)["cs"] == 0x33


def resumed_by_sigreturn(registers: Registers) -> Registers:
    """Return the registers with which an interrupted thread resumes through rt_sigreturn.

    An interrupted system call is restarted as the kernel would (``arch_do_signal_or_restart``). But
    the restart block is lost, so a call that needs it returns EINTR, as after any signal.
    """
    result = dict(registers)
    result["orig_rax"] = _U64
    if registers["orig_rax"] >> 63:
        return result
    code = -registers["rax"] & _U64
    if code in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND):
        result["rax"] = registers["orig_rax"]
        result["rip"] = registers["rip"] - _SYSCALL_LENGTH
    elif code == _ERESTART_RESTARTBLOCK:
        result["rax"] = -_EINTR & _U64
    return result


def call_registers(
    registers: Registers, gadget: int, stack: int, number: int, arguments: tuple[int, ...]
) -> Registers:
    """Return the registers that run one system call at ``gadget`` with the safety frame at
    ``stack``."""
    result = dict(registers)
    result["orig_rax"] = _U64
    result["rip"] = gadget
    result["rsp"] = stack
    result["rax"] = number
    for name, value in zip(
        ("rdi", "rsi", "rdx", "r10", "r8", "r9"), (*arguments, 0, 0, 0, 0, 0, 0)[:6], strict=True
    ):
        result[name] = value
    return result


def result_of(registers: Registers) -> int:
    """Return a system call's result: a value, or -errno."""
    value = registers["rax"]
    return value - (1 << 64) if value >> 63 else value


def _without_unused_tiles(xstate: bytes) -> tuple[bytes, int]:
    """Return the state that a signal frame of this thread would hold, and its feature bits.

    ptrace includes AMX tiles, but for rt_sigreturn a frame with tiles is damaged (and the AVX state
    is lost) unless the thread has requested tiles (``check_xstate_in_sigframe``).
    """
    features, in_use = (
        int(struct.unpack_from("=Q", xstate, at)[0])
        for at in (_FX_SOFTWARE_OFFSET, _XSTATE_BV_OFFSET)
    )
    if not features & _AMX_FEATURES or in_use & _AMX_FEATURES:
        return xstate, features
    end = _END_OF_PKRU if features & _PKRU_FEATURE else _END_OF_AVX512
    return xstate[:end], features & ~_AMX_FEATURES


def safety_frame(
    registers: Registers, xstate: bytes, signal_mask: int, restorer: int
) -> tuple[int, bytes]:
    """Return the frame's address, which is the stack pointer to use, and its content.

    Layout: [address of the restorer][ucontext][padding][xsave area][magic2], the xsave area aligned
    to 64 bytes, the whole below the red zone.
    """
    back = resumed_by_sigreturn(registers)
    xstate, features = _without_unused_tiles(xstate)
    fp_bytes = len(xstate) + 4
    top = registers["rsp"] - _RED_ZONE_BYTES
    fp_address = (top - fp_bytes) & ~63
    context_bytes = 8 + 8 + 8 + 24 + 256 + 8
    start = (fp_address - context_bytes) & ~15

    fp = bytearray(xstate)
    struct.pack_into(
        "=IIQI28x",
        fp,
        _FX_SOFTWARE_OFFSET,
        _FP_XSTATE_MAGIC1,
        fp_bytes,
        features,
        len(xstate),
    )
    fp += struct.pack("=I", _FP_XSTATE_MAGIC2)

    frame = struct.pack("=Q", restorer)
    frame += struct.pack("=QQ", _UC_FLAGS, 0)
    frame += struct.pack("=QiiQ", 0, _SS_FLAGS_INVALID, 0, 0)
    names = [
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
        "rdi",
        "rsi",
        "rbp",
        "rbx",
        "rdx",
        "rax",
        "rcx",
        "rsp",
        "rip",
        "eflags",
    ]
    frame += struct.pack("=18Q", *(back[name] & _U64 for name in names))
    frame += struct.pack("=HHHH", back["cs"], back["gs"] & 0xFFFF, back["fs"] & 0xFFFF, back["ss"])
    frame += struct.pack("=QQQQ", 0, 0, 0, 0)  # err, trapno, oldmask, cr2
    frame += struct.pack("=Q64x", fp_address)
    frame += struct.pack("=Q", signal_mask)
    return start, frame.ljust(fp_address - start, b"\0") + bytes(fp)
