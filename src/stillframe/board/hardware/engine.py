"""One Unicorn engine, which runs a vCPU's instructions.

It rests on measured facts (Unicorn 2.1.4): ``emu_start`` releases the GIL; ``emu_stop`` from
another thread may run an instruction twice, so a ``BlockStop`` ends the run between two blocks;
``hlt`` ends the run with RIP behind the ``hlt``; a faulting instruction leaves RIP at itself,
``int`` behind itself.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86
from unicorn.unicorn_py3 import Uc, UcError
from unicorn.unicorn_py3.unicorn import uclib

from stillframe.board.hardware._block_stop import BlockStop
from stillframe.board.hardware.exception_state import take_error_code
from stillframe.board.hardware.ports import UNKNOWN_PORT
from stillframe.board.hardware.register_bank import RegisterBank
from stillframe.board.hardware.registers import Registers
from stillframe.board.memory.guest_ram import GuestRam

_CODE_BUFFER_BYTES = 64 << 20
"""Room for translated code; Unicorn's default reserves 1 GiB per vCPU."""

_FAULTS = frozenset(
    {
        uc.UC_ERR_READ_UNMAPPED,
        uc.UC_ERR_WRITE_UNMAPPED,
        uc.UC_ERR_FETCH_UNMAPPED,
        uc.UC_ERR_READ_PROT,
        uc.UC_ERR_WRITE_PROT,
        uc.UC_ERR_FETCH_PROT,
    }
)
_ACCESSES = {
    uc.UC_MEM_READ_UNMAPPED: "read",
    uc.UC_MEM_WRITE_UNMAPPED: "write",
    uc.UC_MEM_FETCH_UNMAPPED: "fetch",
}

VECTOR_INVALID_OPCODE = 6
VECTOR_PAGE_FAULT = 14
_PAGE_FAULT_CODES = {"read": 0, "write": 2, "fetch": 16}
"""Error codes for a page that is not present (Intel SDM 3A, 4.7)."""


class PortHandler(Protocol):
    """Takes the guest's port accesses, in the thread that runs it."""

    def port_in(self, port: int, size_bytes: int) -> int: ...

    def port_out(self, port: int, size_bytes: int, value: int) -> None: ...


class Ended:
    """Why ``Engine.run`` returned.

    ``exception``: the vector that the guest ran into, or None.
    ``stopped``: by ``stop`` or ``stop_when_enabled``. With neither, the guest halted.
    ``error_code``: the exception's, if it has one.
    """

    __slots__ = ("error_code", "exception", "stopped")

    def __init__(self) -> None:
        self.exception: int | None = None
        self.stopped = False
        self.error_code = 0


class Engine:
    """Runs x86-64 instructions on guest RAM. For one thread at a time, except the stops."""

    def __init__(self, ports: PortHandler) -> None:
        self._ports = ports
        self._uc = engine = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        engine.ctl_set_tcg_buffer_size(_CODE_BUFFER_BYTES)
        # No address ends a run: Unicorn would translate it through the guest's page tables after
        # each run, and the page fault would overwrite CR2.
        engine.ctl_exits_enabled(True)
        engine.ctl_set_exits([])
        self._bank = RegisterBank(engine)
        self._stop = BlockStop(
            ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0,
            ctypes.cast(uclib.uc_reg_read, ctypes.c_void_p).value or 0,
            x86.UC_X86_REG_RFLAGS,
        )
        self._ended = Ended()
        self._refused_at: int | None = None
        self._failure: Exception | None = None
        self._bad_address = 0
        self._bad_access = "read"
        engine.hook_add(uc.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        engine.hook_add(uc.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        engine.hook_add(uc.UC_HOOK_INSN, self._syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        engine.hook_add(uc.UC_HOOK_INTR, self._interrupt)
        engine.hook_add(uc.UC_HOOK_MEM_UNMAPPED, self._unmapped)
        self._hook_blocks()

    def _hook_blocks(self) -> None:
        # Unicorn's Python binding can hook Python functions only.
        handle = ctypes.c_size_t()
        status = uclib.uc_hook_add(
            self._uc._uch,
            ctypes.byref(handle),
            uc.UC_HOOK_BLOCK,
            ctypes.c_void_p(self._stop.hook_address),
            ctypes.c_void_p(self._stop.data_address),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
        if status != uc.UC_ERR_OK:
            raise UcError(status)

    def map(self, gpa: int, ram: GuestRam) -> None:
        """Map a block for the guest, which must not be running."""
        self._uc.mem_map_ptr(gpa, ram.length_bytes, uc.UC_PROT_ALL, ram.hva)

    def close(self) -> None:
        """Unmap all RAM. No method may be called afterwards."""
        for begin, end, _ in list(self._uc.mem_regions()):
            self._uc.mem_unmap(begin, end - begin + 1)

    def run(self) -> Ended:
        """Run from RIP until ``stop``, ``hlt`` or an exception, without the GIL.

        Raises:
            UcError: the engine itself failed. Exception: a port handler raised it.
        """
        ended = self._ended = Ended()
        self._refused_at = self._failure = None
        try:
            self._uc.emu_start(self.rip, 0)
        except UcError as error:
            if error.errno == uc.UC_ERR_INSN_INVALID:
                ended.exception = VECTOR_INVALID_OPCODE
            elif error.errno in _FAULTS:
                # Nothing is mapped there: the guest sees a page that is not present.
                ended.exception = VECTOR_PAGE_FAULT
                ended.error_code = _PAGE_FAULT_CODES[self._bad_access]
                self._uc.reg_write(x86.UC_X86_REG_CR2, self._bad_address)
            else:
                raise
        else:
            if self._refused_at is not None:
                self.rip = self._refused_at
            elif ended.exception is not None:
                ended.error_code = take_error_code(self._uc)
        if self._failure is not None:
            raise self._failure
        ended.stopped = self._stop.stopped
        return ended

    def stop(self) -> None:
        """Soon end ``run`` in another thread, even one that has yet to begin."""
        self._stop.ask()

    def stop_when_enabled(self) -> None:
        """As ``stop``, but only once the guest has interrupts enabled."""
        self._stop.ask_when_enabled()

    def clear_stop(self) -> None:
        """Forget earlier stops, so that the next ``run`` continues until another stop."""
        self._stop.clear()

    def forget_code(self) -> None:
        """Translate the guest's code anew, since it was replaced. The guest must not be running."""
        self._uc.ctl_flush_tb()

    @property
    def rip(self) -> int:
        value: int = self._uc.reg_read(x86.UC_X86_REG_RIP)
        return value

    @rip.setter
    def rip(self, value: int) -> None:
        self._uc.reg_write(x86.UC_X86_REG_RIP, value)

    @property
    def flags(self) -> int:
        """RFLAGS."""
        value: int = self._uc.reg_read(x86.UC_X86_REG_RFLAGS)
        return value

    def read_registers(self, registers: Registers) -> None:
        """Fill ``registers``, except for the fields that are not a processor's."""
        self._bank.read(registers)

    def write_registers(self, registers: Registers) -> None:
        """Load all of ``registers``.

        Raises:
            UcError: no processor can have them, or a segment's descriptor is not in RAM.
        """
        self._bank.write(registers, self._readable)

    def _readable(self, address: int) -> bool:
        gpa = self.translate(address, write=False)
        return gpa is not None and any(
            begin <= gpa <= end for begin, end, _ in self._uc.mem_regions()
        )

    def get(self, number: int) -> Any:
        """Return a register by its number in ``x86_const``."""
        return self._uc.reg_read(number)

    def set(self, number: int, value: Any) -> None:
        self._uc.reg_write(number, value)

    def translate(self, address: int, *, write: bool) -> int | None:
        """Return the guest-physical address of a linear one; None if no page is present."""
        physical = ctypes.c_uint64()
        access = uc.UC_PROT_WRITE if write else uc.UC_PROT_READ
        status = uclib.uc_vmem_translate(
            self._uc._uch,
            ctypes.c_uint64(address),
            ctypes.c_uint32(access),
            ctypes.byref(physical),
        )
        return physical.value if status == uc.UC_ERR_OK else None

    def _in(self, _engine: Uc, port: int, size_bytes: int, _data: object) -> int:
        try:
            return self._ports.port_in(port, size_bytes)
        except Exception as error:  # noqa: BLE001 - no exception may pass through the engine
            self._fail(error)
            return UNKNOWN_PORT

    def _out(self, _engine: Uc, port: int, size_bytes: int, value: int, _data: object) -> None:
        try:
            self._ports.port_out(port, size_bytes, value)
        except Exception as error:  # noqa: BLE001 - no exception may pass through the engine
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._stop.ask()

    def _syscall(self, engine: Uc, _data: object) -> None:
        # Unicorn leaves syscall to this hook, and the board has no user mode to come from.
        self._ended.exception = VECTOR_INVALID_OPCODE
        self._refused_at = self.rip
        engine.emu_stop()

    def _interrupt(self, engine: Uc, vector: int, _data: object) -> None:
        self._ended.exception = vector
        engine.emu_stop()

    def _unmapped(
        self, _engine: Uc, access: int, address: int, _size: int, _value: int, _data: object
    ) -> bool:
        self._bad_access = _ACCESSES[access]
        self._bad_address = address
        return False
