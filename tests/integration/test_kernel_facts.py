"""What the kernel does, as far as the design relies on it. If one of these fails on a new
kernel, the named decision is to be thought over; nothing of ours is tested here but ``attach``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from stillframe.kernel import uffd_abi
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import Userfaultfd
from tests.support.probes import has_huge_pages, has_uffd_wp
from tests.support.writer_process import IDLE, WriterProcess

PAGE = 4096
MIB = 1 << 20
_WRITEPROTECT, _WAKE = 0xC018AA06, 0x8010AA02
_EVENT_PAGEFAULT, _EVENT_REMOVE, _EVENT_UNMAP = 0x12, 0x15, 0x16
_FLAG_WP = 2
_SYS_CACHESTAT = 451
_PRESENT, _SWAP, _UFFD_WP = 1 << 63, 1 << 62, 1 << 57
_PTE_MARKER = 31
_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass
class Facts:
    """A writer that stands still, its RAM registered for write protection."""

    writer: WriterProcess
    uffd: Userfaultfd

    @property
    def hole(self) -> int:
        """Offset of a page that was never populated."""
        return self.writer.written_bytes + self.writer.block.page_size_bytes

    def protect(self, offset: int, length: int, *, on: bool) -> None:
        argument = struct.pack("=QQQ", self.writer.block.hva + offset, length, int(on))
        fcntl.ioctl(self.uffd.fileno(), _WRITEPROTECT, argument)

    def protect_all(self) -> None:
        self.protect(0, self.writer.block.used_length_bytes, on=True)

    def message(self, within_s: float = 60.0) -> tuple[int, int, int, int] | None:
        """(event, flags or start, address or end, rest) of the next message."""
        if not select.select([self.uffd.fileno()], [], [], within_s)[0]:
            return None
        event, first, second, third = struct.unpack("=B7xQQQ", os.read(self.uffd.fileno(), 32))
        return event, first, second, third

    def writes_at_once(self, offset: int) -> bool:
        """Write a word; True if no protection was in the way: it is done, and no fault is told."""
        self.writer.send(f"w {offset} 1")
        deadline = time.monotonic() + 60
        while not self.writer.answers(0.02):
            if self.uffd.fileno() >= 0 and select.select([self.uffd.fileno()], [], [], 0)[0]:
                return False
            assert time.monotonic() < deadline, "it is neither done nor told as a fault"
        self.writer.answer(1)
        return True

    def read(self, offset: int, length: int = 8) -> bytes | int:
        """process_vm_readv(2) of the writer's RAM: the content, or errno."""
        buffer = ctypes.create_string_buffer(length)
        local = _IoVec(ctypes.addressof(buffer), length)
        remote = _IoVec(self.writer.block.hva + offset, length)
        got = _libc.process_vm_readv(
            self.writer.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0
        )
        return ctypes.get_errno() if got < 0 else buffer.raw[:got]

    def pagemap(self, offset: int) -> int:
        with open(f"/proc/{self.writer.pid}/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek((self.writer.block.hva + offset) // PAGE * 8)
            return int(struct.unpack("=Q", pagemap.read(8))[0])

    def open_file(self) -> int:
        return os.open(f"/proc/{self.writer.pid}/fd/{self.writer.block.backing_fd}", os.O_RDONLY)


def _facts(kind: str, mib: int) -> Iterator[Facts]:
    has_uffd_wp().require()
    with WriterProcess(kind, mib, IDLE) as writer:
        uffd = attach(writer.pid)
        uffd.register(writer.block.hva, writer.block.used_length_bytes)
        try:
            yield Facts(writer, uffd)
        finally:
            uffd.close()


@pytest.fixture(params=["private", "shared", "zero"])
def facts(request: pytest.FixtureRequest) -> Iterator[Facts]:
    yield from _facts(request.param, 4)


@pytest.fixture
def private() -> Iterator[Facts]:
    yield from _facts("private", 4)


@pytest.fixture
def shared() -> Iterator[Facts]:
    yield from _facts("shared", 4)


@pytest.fixture
def huge() -> Iterator[Facts]:
    has_huge_pages(16).require()
    yield from _facts("hugetlb", 16)


def _expect_fault(facts: Facts, offset: int) -> None:
    message = facts.message()
    assert message is not None
    event, flags, address, _ = message
    assert event == _EVENT_PAGEFAULT
    assert flags & _FLAG_WP
    assert address & ~(PAGE - 1) == facts.writer.block.hva + offset


# --- faults and waking --------------------------------------------------------------------------


@pytest.mark.parametrize("populated", [True, False])
def test_protection_covers_populated_and_empty_pages(facts: Facts, populated: bool) -> None:
    """Decision: no page is populated only to protect it (WP_UNPOPULATED, not a read before)."""
    offset = 0 if populated else facts.hole
    facts.protect_all()
    assert not facts.writes_at_once(offset)
    _expect_fault(facts, offset)
    facts.protect(offset, PAGE, on=False)
    assert facts.writer.answer(60).result == 0


def test_huge_pages_are_protected_populated_or_not(huge: Facts) -> None:
    """Decision: hugetlb blocks take the same path, with their own page size."""
    for offset in (0, huge.hole):
        huge.protect_all()
        assert not huge.writes_at_once(offset)
        _expect_fault(huge, offset)
        huge.protect(offset, 2 * MIB, on=False)
        assert huge.writer.answer(60).result == 0


def test_unprotecting_wakes_and_stays(facts: Facts) -> None:
    """Decision: the fault path makes one system call to un-protect and wake."""
    facts.protect_all()
    assert not facts.writes_at_once(0)
    facts.protect(0, PAGE, on=False)
    assert facts.writer.answer(60).result == 0
    assert facts.writes_at_once(8)


def test_closing_the_descriptor_unprotects_and_wakes(facts: Facts) -> None:
    """Decision: only we hold the userfaultfd, so our death frees the guest (invariant 4)."""
    facts.protect_all()
    assert not facts.writes_at_once(0)
    facts.uffd.close()
    assert facts.writer.answer(60).result == 0
    assert facts.writes_at_once(PAGE)
    assert facts.writes_at_once(facts.hole)


def test_unregistering_unprotects_but_wakes_nobody(facts: Facts) -> None:
    """Decision: who unregisters a range wakes it too (``Capture.unregister``); and a copy under
    way must end first, as other threads may write to its page from now on."""
    facts.protect_all()
    assert not facts.writes_at_once(0)
    argument = uffd_abi.RANGE_STRUCT.pack(facts.writer.block.hva, MIB)
    fcntl.ioctl(facts.uffd.fileno(), uffd_abi.UFFDIO_UNREGISTER, argument)
    assert not facts.writer.answers(0.2)
    fcntl.ioctl(facts.uffd.fileno(), _WAKE, argument)
    assert facts.writer.answer(60).result == 0
    assert facts.writes_at_once(PAGE)
    assert not facts.writes_at_once(MIB), "the other part is still protected"


def test_an_unregistered_range_is_enoent(facts: Facts) -> None:
    """Decision: ENOENT while we capture means that something else was mapped there."""
    argument = uffd_abi.RANGE_STRUCT.pack(facts.writer.block.hva, MIB)
    fcntl.ioctl(facts.uffd.fileno(), uffd_abi.UFFDIO_UNREGISTER, argument)
    with pytest.raises(OSError) as caught:
        facts.protect(0, PAGE, on=False)
    assert caught.value.errno == errno.ENOENT


def test_a_dead_process_is_esrch(private: Facts) -> None:
    """Decision: ESRCH, and nothing else, is told as "the VM exited"."""
    private.protect_all()
    private.writer.exit_now()
    with pytest.raises(OSError) as caught:
        private.protect(0, PAGE, on=False)
    assert caught.value.errno == errno.ESRCH
    assert private.read(0) == errno.ESRCH


# --- reading ------------------------------------------------------------------------------------


def test_reading_protected_pages_neither_waits_nor_unprotects(facts: Facts) -> None:
    """Decision: the sweep reads under the protection (freeze, copy, then un-protect)."""
    facts.writer.command("w 0 77")
    facts.protect_all()
    assert facts.read(0) == struct.pack("<Q", 77)
    assert facts.message(0.05) is None
    assert not facts.writes_at_once(0)


def test_reading_a_hole_of_a_memfd_allocates_nothing(shared: Facts) -> None:
    """Decision: shared RAM is read with pread, so looking at holes is harmless."""
    fd = shared.open_file()
    try:
        before = os.fstat(fd).st_blocks
        assert os.pread(fd, 64 * PAGE, shared.hole) == bytes(64 * PAGE)
        assert os.fstat(fd).st_blocks == before
    finally:
        os.close(fd)


def _cached_pages(fd: int, offset: int, length: int) -> int:
    counts = (ctypes.c_uint64 * 5)()
    reach = (ctypes.c_uint64 * 2)(offset, length)
    if _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(reach), ctypes.byref(counts), 0):
        pytest.skip(f"missing cachestat: {os.strerror(ctypes.get_errno())}")
    return counts[0] + counts[3]


def test_cachestat_counts_the_populated_pages_of_a_range(shared: Facts) -> None:
    """Decision: a hole in what was populated shows that RAM was punched out."""
    fd = shared.open_file()
    try:
        end = shared.writer.written_bytes
        assert _cached_pages(fd, 0, 64 * PAGE) == 64
        assert _cached_pages(fd, end - 8 * PAGE, 16 * PAGE) == 8
        shared.writer.drop("h", 4 * PAGE, 2 * PAGE)
        assert _cached_pages(fd, 0, 64 * PAGE) == 62
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4 * PAGE
    finally:
        os.close(fd)


def test_a_punched_huge_page_shows_in_the_file_size_alone(huge: Facts) -> None:
    """Decision: for hugetlb files the blocks that the file uses are compared."""
    fd = huge.open_file()
    try:
        before = os.fstat(fd).st_blocks
        assert os.lseek(fd, 0, os.SEEK_HOLE) == huge.writer.block.used_length_bytes
        huge.writer.drop("h", 0, 2 * MIB)
        assert huge.message(0.1) is None
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.fstat(fd).st_blocks == before - 2 * MIB // 512
    finally:
        os.close(fd)


# --- the page map ---------------------------------------------------------------------------------


def test_how_protection_shows_in_the_page_map(private: Facts) -> None:
    """Decision: the population of private RAM is learned after it was protected, so a
    protected empty page must be told from one in swap."""
    private.protect_all()
    populated, empty = private.pagemap(0), private.pagemap(private.hole)
    assert populated & _PRESENT
    assert populated & _UFFD_WP
    assert not empty & _PRESENT
    assert empty & _SWAP
    assert empty & _UFFD_WP
    assert empty & 31 == _PTE_MARKER
    private.protect(0, private.writer.block.used_length_bytes, on=False)
    assert private.pagemap(private.hole) == 0


# --- RAM that is dropped --------------------------------------------------------------------------


def test_the_remove_event_comes_before_the_pages_go(private: Facts) -> None:
    """Decision: events are handled within the read that lets them happen. And while one is
    unread nothing can be protected or un-protected (EAGAIN), so somebody must always read."""
    private.writer.command("w 0 77")
    private.protect_all()
    private.writer.send(f"d 0 {PAGE}")
    assert select.select([private.uffd.fileno()], [], [], 60)[0]
    assert private.read(0) == struct.pack("<Q", 77)
    for on in (True, False):
        with pytest.raises(OSError) as caught:
            private.protect(PAGE, PAGE, on=on)
        assert caught.value.errno == errno.EAGAIN
    message = private.message()
    assert message is not None
    assert message[:3] == (_EVENT_REMOVE, *(private.writer.block.hva + at for at in (0, PAGE)))
    assert private.writer.answer(60).result == 0
    assert private.read(0) == bytes(8)


def _drop_and_read_event(facts: Facts, how: str) -> None:
    facts.writer.send(f"{how} 0 {PAGE}")
    message = facts.message()
    assert message is not None
    assert message[0] == _EVENT_REMOVE
    assert facts.writer.answer(60).result == 0


def test_dropping_an_anonymous_page_drops_its_protection(private: Facts) -> None:
    """Decision: what is dropped while armed is protected anew at the instant."""
    private.protect_all()
    _drop_and_read_event(private, "d")
    assert not private.pagemap(0) & _UFFD_WP
    assert private.writes_at_once(0)


@pytest.mark.parametrize("how", ["d", "m"])
def test_dropping_a_shared_page_keeps_its_protection(shared: Facts, how: str) -> None:
    """Decision: for shared RAM the hole alone decides, whatever is written later faults."""
    shared.protect_all()
    _drop_and_read_event(shared, how)
    assert not shared.writes_at_once(0)


def test_punching_the_file_makes_no_event_and_keeps_the_protection(shared: Facts) -> None:
    """Decision: each copy of shared RAM is followed by a look for holes."""
    shared.protect_all()
    shared.writer.drop("h", 0, PAGE)
    assert shared.message(0.1) is None
    assert not shared.writes_at_once(0)


def test_the_unmap_event_comes_after_the_fact(private: Facts) -> None:
    """Decision: EFAULT while copying counts as RAM that was unmapped, event or not."""
    private.protect_all()
    private.writer.send(f"u 0 {PAGE}")
    assert select.select([private.uffd.fileno()], [], [], 60)[0]
    assert private.read(0) == errno.EFAULT
    message = private.message()
    assert message is not None
    assert message[0] == _EVENT_UNMAP
    assert private.writer.answer(60).result == 0
