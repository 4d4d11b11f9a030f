"""ptrace(2) on one thread of another process, as far as remote attach needs it.

Source: ptrace(2); Linux ``kernel/ptrace.c``. It uses only PTRACE_SEIZE, which sends no signal, and
no single-stepping: a step that outlives its tracer would end in a SIGTRAP.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from pathlib import Path

from stillframe.errors import HostError, MachineError

_PTRACE_SYSCALL = 24
_PTRACE_DETACH = 17
_PTRACE_GETREGSET = 0x4204
_PTRACE_SETREGSET = 0x4205
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_GETSIGMASK = 0x420A
_PTRACE_SETSIGMASK = 0x420B
_PTRACE_SECCOMP_GET_FILTER = 0x420C
_PTRACE_O_TRACESYSGOOD = 1
_WALL = 0x40000000
_PTRACE_EVENT_STOP = 128
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WAIT_S = 2.0
_INSTRUCTION_BYTES = 8

NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def refuse_tracer(tid: int) -> None:
    """Check that nothing traces the thread yet: it can have only one tracer (ptrace(2)).

    Raises:
        HostError: another process traces it; the error names it. MachineError: the thread is gone.
    """
    try:
        status = Path(f"/proc/{tid}/status").read_text()
        tracer = int(status.partition("TracerPid:")[2].split()[0])
        if not tracer:
            return
        program = Path(f"/proc/{tracer}/comm").read_text(errors="replace").strip()
    except (OSError, IndexError) as error:
        raise MachineError(
            f"thread {tid} of the VM is gone, or whoever traced it", guest_state="unknown"
        ) from error
    raise HostError(
        f"process {tracer} ({program}) traces the VM",
        why="a thread can have one tracer only",
        remedy=f"detach or end {program} (pid {tracer})"
        + (", or use --mode stop" if "tracing stop" not in status else ""),
        guest_state="running",
    )


class TracedThread:
    """One stopped thread of another process; on exit it is detached and runs again.

    All calls must come from the OS thread that made it (a rule of ptrace). When that thread ends,
    in whatever way, the kernel detaches.
    """

    def __init__(self, tid: int) -> None:
        """Seize and stop the thread.

        Raises:
            HostError: not permitted (a debugger is attached, or privileges are missing).
            MachineError: the thread is gone, or does not stop within two seconds.
        """
        self.tid = tid
        self._attached = False
        self._call(_PTRACE_SEIZE, 0, _PTRACE_O_TRACESYSGOOD)
        self._attached = True
        self._call(_PTRACE_INTERRUPT)
        self._reach_signal_stop(self._wait())

    def _call(self, request: int, address: int = 0, data: object = 0) -> int:
        ctypes.set_errno(0)
        result = int(_libc.ptrace(request, self.tid, address, data))
        number = ctypes.get_errno()
        if result == -1 and number:
            if number == errno.ESRCH:
                raise MachineError(f"thread {self.tid} of the VM is gone", guest_state="unknown")
            if not self._attached:
                refuse_tracer(self.tid)
            raise HostError(
                f"attaching to the VM's thread {self.tid} is not possible",
                why=os.strerror(number),
                remedy="run as root, or use --mode stop",
                guest_state="running",
            )
        return result

    def _wait(self) -> int:
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
            if pid:
                if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                    self._attached = False
                    raise MachineError("the VM exited while attaching to it", guest_state="none")
                return status >> 8
            time.sleep(0.00005)
        raise MachineError(
            f"the VM's thread {self.tid} does not stop",
            why="it may be blocked in the kernel (a hung disk or network file system)",
            remedy="try again once its I/O has recovered",
            guest_state="running",
        )

    def registers(self, kind: int = NT_PRSTATUS, most_bytes: int = 32768) -> bytes:
        """Return a register set in the kernel's layout (NT_PRSTATUS, NT_X86_XSTATE)."""
        buffer = ctypes.create_string_buffer(most_bytes)
        vector = _IoVec(ctypes.addressof(buffer), most_bytes)
        self._call(_PTRACE_GETREGSET, kind, ctypes.byref(vector))
        return buffer.raw[: vector.length]

    def set_registers(self, content: bytes) -> None:
        """Set the general registers (NT_PRSTATUS), atomically."""
        buffer = ctypes.create_string_buffer(content, len(content))
        vector = _IoVec(ctypes.addressof(buffer), len(content))
        self._call(_PTRACE_SETREGSET, NT_PRSTATUS, ctypes.byref(vector))

    def signal_mask(self) -> int:
        """Return the signals that the thread blocks in user mode, one bit each."""
        mask = ctypes.c_uint64()
        self._call(_PTRACE_GETSIGMASK, 8, ctypes.byref(mask))
        return mask.value

    def set_signal_mask(self, mask: int) -> None:
        self._call(_PTRACE_SETSIGMASK, 8, ctypes.byref(ctypes.c_uint64(mask)))

    def seccomp_filter(self, index: int) -> bytes | None:
        """Return the classic BPF program number ``index``, newest first; None after the last.

        Raises:
            HostError: reading it needs CAP_SYS_ADMIN.
        """
        try:
            count = self._call(_PTRACE_SECCOMP_GET_FILTER, index, 0)
        except HostError as error:
            if error.why == os.strerror(errno.ENOENT):
                return None
            raise
        buffer = ctypes.create_string_buffer(count * _INSTRUCTION_BYTES)
        self._call(_PTRACE_SECCOMP_GET_FILTER, index, ctypes.byref(buffer))
        return buffer.raw

    def run_syscall(self) -> None:
        """Let the thread enter its next system call and leave it again.

        Afterwards the thread is stopped at the system call's exit. Signals must be blocked.
        """
        seen = stop = 0
        while seen < 2:
            stop = self._run_on(stop)
            seen += stop == _SYSCALL_STOP

    def stop_for_signals(self) -> None:
        """Stop the thread once more where the kernel checks for signals on the way to user mode. If
        the registers before were a system call's, registers set here are, too: on detaching, the
        kernel restarts or interrupts the call as after any other stop."""
        self._call(_PTRACE_INTERRUPT)
        self._reach_signal_stop(self._run_on(0))

    def _reach_signal_stop(self, stop: int) -> None:
        while stop >> 8 != _PTRACE_EVENT_STOP:
            stop = self._run_on(stop)

    def _run_on(self, stop: int) -> int:
        # A signal for the thread stops it, too, and must be passed on. (Later all but SIGSTOP are
        # blocked.)
        signal_number = stop if 0 < stop < _SYSCALL_STOP & ~signal.SIGTRAP else 0
        self._call(_PTRACE_SYSCALL, 0, signal_number)
        return self._wait()

    def detach(self) -> None:
        """Let the thread run on untraced."""
        if self._attached:
            self._attached = False
            self._call(_PTRACE_DETACH)

    def __enter__(self) -> TracedThread:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()
