"""What the SIGSEGV handler does in a process of its own, which may die of it.

Run as ``python -m tests.support.own_faults_child SCENARIO [ARGUMENT]``.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.capture import _capture, signal_protection
from stillframe.capture.ram_capture import RamCapture
from stillframe.capture.signal_protection import SignalProtection
from stillframe.errors import HostError
from tests.support.native_build import build
from tests.support.own_writer import OwnWriter, capturing, write_words

PAGE = 4096
MIB = 1 << 20
_Prepare = ctypes.CFUNCTYPE(ctypes.c_int)


def _faults() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("tests/native/own_faults.c", "-shared", "-fPIC")))
    library.errno_after_write.argtypes = [ctypes.c_void_p]
    library.write_by_special_thread.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return library


@contextmanager
def _armed() -> Iterator[tuple[GuestRam, RamCapture]]:
    """RAM that is protected with mprotect; a write to it is served."""
    ram = GuestRam("ram", MIB)
    ram.touch(0, MIB)
    with capturing("mprotect", [ram]) as capture:
        capture.arm()
        yield ram, capture
    ram.close()


def _serves(ram: GuestRam, capture: RamCapture) -> bool:
    """Whether a fault is served now, and told."""
    capture.take_written()
    write_words(ram, [3 * 64 * 1024 + 8], 5)
    return capture.take_written() == [(0, 3 * 16, 16)] and ram.read(3 * 65536 + 8, 1) == b"\5"


def fault(kind: str) -> None:
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
        if kind == "sent":
            os.kill(os.getpid(), signal.SIGSEGV)
        _faults().fault(kind.encode())


def fault_after(kind: str) -> None:
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
    _faults().fault(kind.encode())


def chained(kind: str) -> None:
    """A handler that was there before mends its own faults, again and again."""
    faults = _faults()
    assert faults.install(kind.encode()) == 0
    with _armed() as (ram, capture):
        for count in range(1, 4):
            assert _serves(ram, capture)
            assert faults.fault_and_be_mended() == count
    assert faults.fault_and_be_mended() == 4


def installed_over(kind: str) -> None:
    """A handler that was installed over ours comes below at the next capture."""
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
    faults = _faults()
    assert faults.install(kind.encode()) == 0
    for count in range(1, 4):
        with _armed() as (ram, capture):
            assert _serves(ram, capture)
            assert faults.fault_and_be_mended() == count


def installed_over_and_passes_back(_: str) -> None:
    """It calls ours for what is not its own: that ends at the default action."""
    with _armed():
        pass
    faults = _faults()
    assert faults.install(b"below") == 0
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
        faults.fault(b"null")


def python_faulthandler(order: str) -> None:
    """Its report comes, once, and then the default action."""
    if order == "before":
        faulthandler.enable()
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
    if order != "before":
        faulthandler.enable()
    if order == "twice":
        with _armed() as (ram, capture):
            assert _serves(ram, capture)
        faulthandler.disable()
        faulthandler.enable()
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
        _faults().fault(b"null")


def faulthandler_taken_away(_: str) -> None:
    """Its disable() removes our handler too; the next capture brings it back."""
    faulthandler.enable()
    with _armed() as (ram, capture):
        assert _serves(ram, capture)
    faulthandler.disable()
    with _armed() as (ram, capture):
        assert _serves(ram, capture)


def errno_kept(_: str) -> None:
    with _armed() as (ram, _):
        assert _faults().errno_after_write(ram.hva) == 77


def special_thread(how: str) -> None:
    """A thread at the end of its stack, or one that blocks SIGSEGV; prepared or not."""
    prepare = _Prepare(_capture.signal_prepare_thread)
    pointer = ctypes.cast(prepare, ctypes.c_void_p) if "prepared" in how else None
    with _armed() as (ram, _):
        faults = _faults()
        for n in range(3):
            at = ram.hva + n * 65536
            assert faults.write_by_special_thread(at, pointer, int("blocking" in how)) == 0
            assert ram.read(n * 65536, 1) == b"\7"


def holding_the_gil(_: str) -> None:
    """The fault thread needs no lock of the interpreter."""
    with _armed() as (ram, capture):
        for n in range(0, MIB, 65536):
            ctypes.c_char.from_address(ram.hva + n).value = b"x"
        assert capture.take_written() == [(0, 0, 256)]


def forked_child(_: str) -> None:
    """Its faults are its own, also where our RAM is mapped."""
    with _armed() as (ram, capture):
        child = os.fork()
        if child == 0:
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int] * 3 + [ctypes.c_long]
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            assert libc.mmap(ram.hva, PAGE, mmap.PROT_READ, flags, -1, 0) == ram.hva
            ctypes.memset(ram.hva, 1, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
        child = os.fork()
        if child == 0:
            with _armed() as (own, its):
                os._exit(0 if _serves(own, its) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert _serves(ram, capture)


def too_many_mappings(_: str) -> None:
    """Where chunks are too small for the kernel's limit, only the capture fails."""
    signal_protection.chunk_bytes = lambda _: 2 * PAGE
    ram = GuestRam("ram", 128 * MIB)
    with capturing("mprotect", [ram]) as capture:
        capture.arm()
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        others = GuestRam("others", 512 * MIB)
        for n in range(0, 60000, 2):
            assert libc.mprotect(others.hva + n * PAGE, PAGE, mmap.PROT_READ) == 0
        offsets = range(0, ram.length_bytes, 4 * PAGE)
        thread = threading.Thread(target=write_words, args=(ram, offsets, 1))
        thread.start()
        deadline = time.monotonic() + 60
        while not capture.statistics()["error"] and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(HostError, match="out of memory"):
            capture.check()
        capture.release()
        thread.join(timeout=60)
        assert not thread.is_alive()


def given_up_at_once(_: str) -> None:
    """Threads fault in a range that nobody serves: the end of its protection lets them go on,
    wherever they are on their way to the handler."""
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with ExitStack() as stack:
        rams = [GuestRam(f"ram{n}", 16 * PAGE) for n in range(4)]
        writers = [stack.enter_context(OwnWriter(ram)) for ram in rams]
        for _ in range(15000):
            protection = SignalProtection()
            for ram in rams:
                protection.register(ram.hva, 16 * PAGE)
                assert libc.mprotect(ram.hva, 16 * PAGE, mmap.PROT_READ) == 0
            protection.close()
        for writer in writers:
            before = writer.pages
            while writer.pages == before:
                time.sleep(0.001)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        fault,
        fault_after,
        chained,
        installed_over,
        installed_over_and_passes_back,
        python_faulthandler,
        faulthandler_taken_away,
        errno_kept,
        special_thread,
        holding_the_gil,
        forked_child,
        too_many_mappings,
        given_up_at_once,
    )
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")
    print("survived", flush=True)
