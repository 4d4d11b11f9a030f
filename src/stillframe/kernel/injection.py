"""Injection of single system calls into another process, safe against our own death.

``arch_x86_64`` explains how. The calls run on one thread, which is stopped for about two
milliseconds; signals that arrive meanwhile stay pending and are delivered afterwards.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillframe.errors import HostError, MachineError, RefusedError, host_error
from stillframe.kernel import arch_x86_64 as arch
from stillframe.kernel import seccomp
from stillframe.kernel.ptrace import NT_X86_XSTATE, TracedThread

_ALL_SIGNALS = (1 << 64) - 1
_ELFCLASS32 = b"\x01"
_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ (\d+)\s*(.*)")
_MOST_TEXT_BYTES = 64 << 20
ROOM_BYTES = 512
"""Size of :attr:`RemoteSyscalls.room`."""


class RemoteSyscalls:
    """System calls in another process, as a context manager.

    Inside the context, one thread of the process is stopped; on exit it resumes exactly where it
    was. The guest runs meanwhile (the vCPU threads are not touched), but waits if it needs the
    stopped thread: keep it short.
    """

    def __init__(self, pid: int, gadgets: tuple[int, int] | None = None) -> None:
        """``gadgets``: the result of :func:`find_gadgets`, if it was called before."""
        self._pid = pid
        self._gadget, self._restorer = gadgets or find_gadgets(pid)
        self._thread: TracedThread | None = None
        self._before: arch.Registers = {}
        self._mask = 0
        self._stack = 0
        self._changed = False

    def __enter__(self) -> RemoteSyscalls:
        thread = TracedThread(self._pid)
        try:
            raw = thread.registers()
            if not arch.is_64_bit(raw):
                raise RefusedError(
                    f"process {self._pid} is not a 64-bit x86-64 program",
                    remedy="use --mode stop",
                )
            _refuse_shadow_stack(self._pid)
            self._before = arch.unpack_registers(raw)
            self._mask = thread.signal_mask()
            self._stack, frame = arch.safety_frame(
                self._before, thread.registers(NT_X86_XSTATE), self._mask, self._restorer
            )
            _write_memory(self._pid, self._stack, frame)
        except BaseException:
            thread.detach()
            raise
        self._thread = thread
        return self

    def refuse_unless_allowed(self, calls: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Evaluate the process's seccomp filters for the calls, by name.

        Raises:
            RefusedError: a filter forbids one of them, or the filters cannot be read.
        """
        thread = self._require()
        if _status_field(self._pid, "Seccomp") in ("0", ""):
            return
        index = 0
        while True:
            try:
                program = thread.seccomp_filter(index)
            except HostError as error:
                raise RefusedError(
                    "the VM runs under seccomp and its filter cannot be read",
                    why=error.why,
                    remedy="run as root with CAP_SYS_ADMIN, or use --mode stop",
                ) from error
            if program is None:
                break
            for name, (number, arguments) in calls.items():
                if not seccomp.allows(program, number, arguments, self._gadget + 2):
                    raise RefusedError(
                        f"the VM's seccomp filter does not allow {name}",
                        remedy="start the VM without -sandbox, or use --mode stop",
                    )
            index += 1
        if index == 0:
            raise RefusedError(
                "the VM runs under seccomp and its filter cannot be read",
                remedy="use --mode stop",
            )

    def call(self, number: int, *arguments: int) -> int:
        """Run one system call in the process; return its result, or -errno."""
        thread = self._require()
        registers = arch.call_registers(self._before, self._gadget, self._stack, number, arguments)
        # Registers first: from here on the frame restores the thread and its signal mask by itself,
        # so blocking signals after this cannot outlive us.
        thread.set_registers(arch.pack_registers(registers))
        self._changed = True
        thread.set_signal_mask(_ALL_SIGNALS)
        thread.run_syscall()
        return arch.result_of(arch.unpack_registers(thread.registers()))

    @property
    def room(self) -> int:
        """Address of ``ROOM_BYTES`` of the thread's stack, below all that it uses, for
        arguments."""
        self._require()
        return (self._stack - ROOM_BYTES) & ~15

    def write(self, address: int, content: bytes) -> None:
        """Write to the process's memory.

        Raises:
            RefusedError: the memory cannot be written.
        """
        _write_memory(self._pid, address, content)

    def read(self, address: int, length_bytes: int) -> bytes:
        """Read the process's memory; return nothing if it cannot be read there."""
        try:
            with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as memory:
                return _read_text(memory.fileno(), address, length_bytes)
        except OSError:
            return b""

    def _require(self) -> TracedThread:
        if self._thread is None:
            raise MachineError("not attached to the VM", guest_state="running")
        return self._thread

    def __exit__(self, *_error: object) -> None:
        thread, self._thread = self._require(), None
        try:
            if self._changed:
                # Return to a stop like the first one, so that an interrupted system call is
                # restarted, or interrupted by a pending signal, as if nothing had happened.
                thread.stop_for_signals()
                # The mask before the registers: dying in between still ends in the frame.
                thread.set_signal_mask(self._mask)
                thread.set_registers(arch.pack_registers(self._before))
        finally:
            thread.detach()


def find_gadgets(pid: int) -> tuple[int, int]:
    """Find the addresses of a ``syscall … ret`` and of a signal restorer in the process's code.

    Raises:
        MachineError: the process is gone. HostError: it may not or cannot be inspected.
        RefusedError: it is not a 64-bit program, or its code has none (static builds without a
            libc).
    """
    _refuse_other_class(pid)
    try:
        with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb") as mem:
            regions = [
                (int(found[1], 16), int(found[2], 16), found[4])
                for found in map(_MAPS_LINE.match, maps)
                if found
            ]
            # libc has both; search it first.
            regions.sort(key=lambda region: "libc" not in region[2])
            gadget = restorer = 0
            for low, high, _ in regions:
                text = _read_text(mem.fileno(), low, min(high - low, _MOST_TEXT_BYTES))
                gadget = gadget or _first(text, arch.GADGETS, low)
                restorer = restorer or _first(text, arch.RESTORERS, low)
                if gadget and restorer:
                    return gadget, restorer
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MachineError(f"process {pid} is gone", guest_state="none") from error
    except PermissionError as error:
        raise HostError(
            f"process {pid} may not be inspected",
            why=str(error),
            remedy="run as root",
            guest_state="running",
        ) from error
    except OSError as error:
        raise host_error(f"process {pid} cannot be inspected", error) from error
    raise RefusedError(
        f"process {pid} has no code to attach through",
        why="no 'syscall; ret' and signal restorer in its text",
        remedy="use --mode stop",
    )


def _refuse_other_class(pid: int) -> None:
    try:
        with Path(f"/proc/{pid}/exe").open("rb") as program:
            elf_class = program.read(5)[4:]
    except OSError:
        return  # the next access to the process reports why
    if elf_class == _ELFCLASS32:
        raise RefusedError(
            f"process {pid} is not a 64-bit x86-64 program", remedy="use --mode stop"
        )


def _read_text(fd: int, start: int, length_bytes: int) -> bytes:
    try:
        return os.pread(fd, length_bytes, start)
    except OSError:
        return b""  # [vsyscall] is listed but cannot be read


def _first(text: bytes, patterns: tuple[bytes, ...], base: int) -> int:
    for pattern in patterns:
        at = text.find(pattern)
        if at >= 0:
            return base + at
    return 0


def _write_memory(pid: int, address: int, content: bytes) -> None:
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            written = os.pwrite(fd, content, address)
        finally:
            os.close(fd)
    except OSError as error:
        raise RefusedError(
            "attaching to the VM is not possible",
            why=f"its stack cannot be written: {error.strerror}",
            remedy="try again, or use --mode stop",
        ) from error
    if written != len(content):
        raise RefusedError("attaching to the VM is not possible", why="its stack ends too early")


def _status_field(tid: int, name: str) -> str:
    try:
        for line in Path(f"/proc/{tid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split(":", 1)[1].strip()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MachineError(f"process {tid} is gone", guest_state="none") from error
    return ""


def _refuse_shadow_stack(pid: int) -> None:
    if "shstk" in _status_field(pid, "x86_Thread_features"):
        raise RefusedError(
            "the VM's process uses a shadow stack",
            why="attaching through a signal frame would be stopped by it",
            remedy="start the VM with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off, or --mode stop",
        )
