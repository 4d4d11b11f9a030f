"""Native threads of this process that write guest RAM of ours, and captures of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.own_protection import open_own_protection
from stillframe.capture.ram_capture import RamCapture
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import HostError
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.model import ProtectionKind
from tests.support.native_build import build
from tests.support.probes import has_uffd_wp
from tests.support.writer_process import Captured, drain

FULL_SPEED_US = 0


@cache
def native() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("tests/native/own_writer.c", "-shared", "-fPIC")))
    library.writer_start.restype = ctypes.c_void_p
    library.writer_start.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    for name in ("writer_pause", "writer_continue", "writer_end", "writer_pages"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.writer_pages.restype = ctypes.c_uint64
    library.write_words.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_size_t,
        ctypes.c_uint64,
    ]
    return library


def write_words(ram: GuestRam, offsets: Sequence[int], value: int) -> None:
    """Write one word at each offset, by this thread, in native code."""
    array = (ctypes.c_uint64 * len(offsets))(*offsets)
    native().write_words(ram.hva, array, len(offsets), value)


class OwnWriter:
    """Writes the first three quarters of a block, pass after pass; ends with the context."""

    def __init__(self, ram: GuestRam, *, pause_us: int = FULL_SPEED_US) -> None:
        self.ram = ram
        self.written_bytes = ram.length_bytes // 4 * 3 & ~4095
        ram.touch(0, self.written_bytes)
        self._native = native()
        self._writer = self._native.writer_start(ram.hva, self.written_bytes, pause_us)

    def pause(self) -> None:
        self._native.writer_pause(self._writer)

    def go_on(self) -> None:
        self._native.writer_continue(self._writer)

    @property
    def pages(self) -> int:
        """Pages written so far."""
        return int(self._native.writer_pages(self._writer))

    def __enter__(self) -> OwnWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        self._native.writer_end(self._writer)


def open_kind(kind: ProtectionKind) -> WriteProtection:
    """A protection of just this kind; skips the test where the host has none."""
    if kind == "mprotect":
        return open_own_protection("mprotect")
    if kind == "userfaultfd":
        has_uffd_wp().require()
    try:
        uffd = Userfaultfd.for_this_process(user_mode_only=kind == "userfaultfd-user")
        uffd.handshake()
    except HostError as error:
        pytest.skip(f"missing uffd-wp: {error}")
    return uffd


@contextlib.contextmanager
def capturing(
    kind: ProtectionKind | Callable[[], WriteProtection],
    rams: Sequence[GuestRam],
    *,
    spill_bytes: int = 16 << 20,
    make: Callable[..., RamCapture] = RamCapture,
) -> Iterator[RamCapture]:
    """A capture of our own blocks, registered and started."""
    blocks = [ram.block() for ram in rams]
    protection = kind() if callable(kind) else open_kind(kind)
    capture = make(protection, os.getpid(), blocks, spill_bytes=spill_bytes)
    try:
        capture.register()
        capture.start()
        yield capture
    finally:
        capture.release()
        capture.close()


def take_own(
    kind: ProtectionKind | Callable[[], WriteProtection],
    writers: Sequence[OwnWriter],
    *,
    spill_bytes: int = 16 << 20,
    make: Callable[..., RamCapture] = RamCapture,
) -> list[Captured]:
    """One whole capture of the writers' blocks at one instant; a result for each."""
    rams = [writer.ram for writer in writers]
    found = {ram.idstr: Captured() for ram in rams}
    with capturing(kind, rams, spill_bytes=spill_bytes, make=make) as capture:
        capture.arm()
        for writer in writers:
            writer.pause()
        capture.protect_written()
        writes = capture.instant()
        for writer in writers:
            writer.go_on()
        drain(capture, found)
        capture.finish()
        drain(capture, found, 1)
        capture.check()
        for captured in found.values():
            captured.statistics = capture.statistics()
            captured.writes = writes
    return [found[ram.idstr] for ram in rams]
