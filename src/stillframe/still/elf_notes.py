"""Notes of an ELF core that describe x86-64 vCPUs.

Each vCPU has two, as in QEMU's ``dump-guest-memory``: ``CORE``/``NT_PRSTATUS``, which debuggers
read (Linux ``include/uapi/linux/elfcore.h``, ``struct elf_prstatus``, and
``arch/x86/include/asm/user_64.h``, ``struct user_regs_struct``), and ``QEMU``/0 with the control
and segment registers (QEMU ``target/i386/arch_dump.c``, ``QEMUCPUState`` version 1).
"""

from __future__ import annotations

import struct
from typing import Final

from stillframe.vmstate.x86_cpu import X86CpuState, X86Segment

NT_PRSTATUS: Final = 1
NT_QEMU: Final = 0

_NOTE = struct.Struct("<III")  # name length, descriptor length, type
_PRSTATUS = struct.Struct("<32xI76x27Q8x")
_QEMU_HEAD = struct.Struct("<II18Q")
_QEMU_SEGMENT = struct.Struct("<IIIIQ")
_QEMU_TAIL = struct.Struct("<6Q")
_QEMU_VERSION = 1
_QEMU_BYTES = _QEMU_HEAD.size + 10 * _QEMU_SEGMENT.size + _QEMU_TAIL.size


def prstatus_note(cpu: X86CpuState, number: int) -> bytes:
    """Return the note that debuggers read as a thread; ``number`` counts from 1."""
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 = cpu.regs
    orig_rax = 0
    general = (r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax)
    flow = (cpu.eip, cpu.cs.selector, cpu.eflags, rsp, cpu.ss.selector)
    bases = (cpu.fs.base, cpu.gs.base)
    selectors = tuple(segment.selector for segment in (cpu.ds, cpu.es, cpu.fs, cpu.gs))
    return _note(b"CORE", NT_PRSTATUS, _PRSTATUS.pack(number, *general, *flow, *bases, *selectors))


def qemu_note(cpu: X86CpuState) -> bytes:
    """Return the note in which crash finds the kernel's page tables."""
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *extended = cpu.regs
    head = _QEMU_HEAD.pack(
        _QEMU_VERSION,
        _QEMU_BYTES,
        *(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp),
        *extended,
        cpu.eip,
        cpu.eflags,
    )
    segments = (cpu.cs, cpu.ds, cpu.es, cpu.fs, cpu.gs, cpu.ss)
    tables = (cpu.ldt, cpu.tr, cpu.gdt, cpu.idt)
    cr1 = 0
    tail = _QEMU_TAIL.pack(cpu.cr0, cr1, cpu.cr2, cpu.cr3, cpu.cr4, cpu.kernel_gs_base)
    return _note(b"QEMU", NT_QEMU, head + b"".join(map(_segment, segments + tables)) + tail)


def _segment(segment: X86Segment) -> bytes:
    return _QEMU_SEGMENT.pack(segment.selector, segment.limit, segment.flags, 0, segment.base)


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    name += b"\0"
    padded = name.ljust(-(-len(name) // 4) * 4, b"\0")
    return _NOTE.pack(len(name), len(content), kind) + padded + content
