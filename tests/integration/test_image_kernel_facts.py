"""What the kernel does, as far as images rely on it (docs/concepts/images.md). If one of these
fails on a new kernel, the named decision is to be thought over.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from stillframe.errors import HostError
from stillframe.image import _fill
from stillframe.image.clone import is_userfaultfd
from stillframe.kernel.proc_maps import read_maps
from stillframe.kernel.remote_attach import fetch_fd
from stillframe.kernel.remote_missing import close_there, watch_missing
from stillframe.kernel.userfaultfd import IMAGE_PAGES, Userfaultfd
from tests.support.image_vm import read_waiting
from tests.support.mapper import Mapper
from tests.support.probes import has_uffd_wp

PAGE = 4096
LENGTH = 4 << 20
CONTENT = bytes([7]) * PAGE
_MADV_COLLAPSE = 25
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


@dataclass
class Image:
    """A file of holes, our mapping of it, and processes that map it and are watched."""

    fd: int
    own: Userfaultfd
    pages: _fill.Pages
    address: int
    mappers: list[Mapper] = field(default_factory=list)

    def mapper(self, kind: str) -> tuple[Mapper, Userfaultfd, int, int]:
        """(process, its userfaultfd here, its number there, the address there)."""
        mapper = Mapper(self.fd, LENGTH, kind)
        self.mappers.append(mapper)
        inode = os.fstat(self.fd).st_ino
        (vma,) = [
            v for v in read_maps(mapper.pid).vmas if v.inode == inode and v.length_bytes == LENGTH
        ]
        uffd, number = watch_missing(mapper.pid, [(vma.start, LENGTH)])
        return mapper, uffd, number, vma.start

    def place(self, page: int, content: bytes = CONTENT) -> int:
        return self.pages.place(page, 1, content, 0, PAGE)


@pytest.fixture
def image() -> Iterator[Image]:
    has_uffd_wp().require()
    fd = os.memfd_create("facts")
    os.ftruncate(fd, LENGTH)
    address = _fill.map_file(fd, LENGTH)
    with Userfaultfd.for_this_process(user_mode_only=True) as own:
        own.handshake(IMAGE_PAGES)
        own.register(address, LENGTH, IMAGE_PAGES)
        found = Image(fd, own, _fill.Pages(fd, own.fileno(), address, LENGTH // PAGE), address)
        yield found
        for mapper in found.mappers:
            mapper.close()
    _fill.unmap(address, LENGTH)
    os.close(fd)


def _message(uffd: Userfaultfd) -> int | None:
    """Address of the next fault."""
    if not select.select([uffd.fileno()], [], [], 60.0)[0]:
        return None
    event, _, address, _ = struct.unpack("=B7xQQQ", os.read(uffd.fileno(), 32))
    assert event == 0x12
    return int(address) & -PAGE


kinds = pytest.mark.parametrize("kind", ["shared", "private"])


@kinds
def test_who_touches_a_hole_waits_until_it_is_woken(image: Image, kind: str) -> None:
    """Decision: a fault is answered by a page in the *file* and a wake, for both mappings."""
    mapper, uffd, _, base = image.mapper(kind)
    mapper.touch(5 * PAGE)
    assert _message(uffd) == base + 5 * PAGE
    assert image.place(5) == 1
    assert mapper.answer(0.2) is None, "a page without a wake is not enough"
    assert _fill.wake(uffd.fileno(), base + 5 * PAGE, PAGE) == 0
    assert mapper.answer() == 7


@kinds
def test_a_page_that_is_there_needs_nobody(image: Image, kind: str) -> None:
    """Decision: what was read before anybody asks costs the guest nothing."""
    mapper, uffd, _, _ = image.mapper(kind)
    image.place(3)
    mapper.touch(3 * PAGE)
    assert mapper.answer() == 7
    assert not select.select([uffd.fileno()], [], [], 0)[0]


def test_private_mappings_share_what_they_read_and_own_what_they_write(image: Image) -> None:
    first, _, _, _ = image.mapper("private")
    second, _, _, _ = image.mapper("private")
    image.place(0)
    first.write(0, 9)
    assert first.answer() == 9
    second.touch(0)
    assert second.answer() == 7
    assert os.pread(image.fd, 1, 0) == b"\7"


def test_a_page_is_placed_once_and_alone(image: Image) -> None:
    """Decision: a placed page is never placed again over what the guest wrote; and no neighbour
    comes with it, whatever the policy of huge pages."""
    mapper, _, _, _ = image.mapper("shared")
    image.place(8)
    mapper.write(8 * PAGE, 1)
    assert mapper.answer() == 1
    fresh = _fill.Pages(image.fd, image.own.fileno(), image.address, LENGTH // PAGE)
    assert fresh.place(8, 1, CONTENT, 0, PAGE) == 0
    assert os.pread(image.fd, 1, 8 * PAGE) == b"\1"
    assert fresh.scan() == 1
    assert fresh.all_there(8, 1)
    assert not fresh.all_there(7, 2)


def _after_collapse(fd: int) -> int:
    """Bytes in the file once a huge page was asked for over its beginning."""
    huge = 2 << 20
    reserved = _libc.mmap(None, ctypes.c_size_t(2 * huge), 0, 0x22, -1, 0)
    start = ctypes.c_void_p(-(-reserved // huge) * huge)
    _libc.mmap(start, ctypes.c_size_t(huge), 3, mmap.MAP_SHARED | 0x10, fd, ctypes.c_int64(0))
    _libc.madvise(start, ctypes.c_size_t(huge), _MADV_COLLAPSE)
    found = os.fstat(fd).st_blocks * 512
    _fill.unmap(reserved, 2 * huge)
    return found


def test_no_huge_page_over_holes_that_somebody_waits_for(image: Image) -> None:
    """Decision: a partly filled image is safe from khugepaged, besides MADV_NOHUGEPAGE."""
    image.mapper("private")
    image.place(0)
    assert _after_collapse(image.fd) == PAGE
    other = os.memfd_create("unwatched")
    os.ftruncate(other, LENGTH)
    os.pwrite(other, CONTENT, 0)
    assert _after_collapse(other) in (2 << 20, PAGE), "PAGE: a kernel without huge pages"
    os.close(other)


@kinds
def test_the_descriptor_in_the_clone_keeps_it_waiting(image: Image, kind: str) -> None:
    """Decision: the clone keeps one, and an heir fetches it and wakes all (invariant 10)."""
    mapper, uffd, number, base = image.mapper(kind)
    mapper.touch(0)
    assert _message(uffd) == base
    uffd.close()  # the filler died after it had read the fault
    assert mapper.answer(0.3) is None
    assert is_userfaultfd(mapper.pid, number)
    pidfd = os.pidfd_open(mapper.pid)
    heir = Userfaultfd(fetch_fd(pidfd, number))
    os.close(pidfd)
    assert not select.select([heir.fileno()], [], [], 0.1)[0], "a fault is told once"
    _fill.wake(heir.fileno(), base, LENGTH)
    assert _message(heir) == base, "woken, it faults again"
    image.place(0)
    _fill.wake(heir.fileno(), base, PAGE)
    assert mapper.answer() == 7
    heir.close()


@kinds
def test_without_any_descriptor_holes_are_zeroes(image: Image, kind: str) -> None:
    """The danger: this is what a clone without a descriptor of its own would read."""
    mapper, uffd, number, _ = image.mapper(kind)
    close_there(mapper.pid, number)
    mapper.touch(0)
    assert mapper.answer(0.3) is None
    uffd.close()
    assert mapper.answer() == 0


@kinds
def test_unregistering_wakes_and_holes_are_zeroes_then(image: Image, kind: str) -> None:
    """Decision: a complete image needs no zero pages in it, and nobody who serves."""
    mapper, uffd, _, base = image.mapper(kind)
    mapper.touch(PAGE)
    assert _message(uffd) == base + PAGE
    uffd.unregister(base, LENGTH)
    assert mapper.answer() == 0


def test_what_a_process_had_before_is_dropped(image: Image) -> None:
    """Decision: pages that a VM touched before it was watched do not stay (``watch_missing``, then
    a hole over the whole file)."""
    mapper = Mapper(image.fd, LENGTH, "private")
    image.mappers.append(mapper)
    mapper.write(0, 3)
    assert mapper.answer() == 3
    mapper.touch(PAGE)
    assert mapper.answer() == 0
    inode = os.fstat(image.fd).st_ino
    (vma,) = [v for v in read_maps(mapper.pid).vmas if v.inode == inode]
    uffd, _ = watch_missing(mapper.pid, [(vma.start, LENGTH)])
    assert _libc.fallocate(image.fd, 3, ctypes.c_int64(0), ctypes.c_int64(LENGTH)) == 0
    for page in (0, 1):
        mapper.touch(page * PAGE)
        assert _message(uffd) == vma.start + page * PAGE
        image.place(page)
        _fill.wake(uffd.fileno(), vma.start + page * PAGE, PAGE)
        assert mapper.answer() == 7


def test_reading_from_outside_waits_or_fails_but_sees_no_zeroes(image: Image) -> None:
    """``/proc/PID/mem`` answers EIO at a hole, process_vm_readv(2) waits."""
    mapper, uffd, _, base = image.mapper("private")
    with open(f"/proc/{mapper.pid}/mem", "rb", 0) as memory, pytest.raises(OSError) as error:
        os.pread(memory.fileno(), PAGE, base)
    assert error.value.errno == errno.EIO
    pid = os.fork()
    if pid == 0:
        os._exit(0 if read_waiting(mapper.pid, base, PAGE)[:] == CONTENT else 1)
    assert _message(uffd) == base
    image.place(0)
    _fill.wake(uffd.fileno(), base, PAGE)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_process_without_privileges_takes_the_device(image: Image) -> None:
    """Decision: VMs inherit /dev/userfaultfd where the host gives it."""
    if not os.path.exists("/dev/userfaultfd"):
        pytest.skip("missing userfaultfd-device: no /dev/userfaultfd (Linux 6.1)")
    lent = os.open("/dev/userfaultfd", os.O_RDWR)
    os.chmod(f"/proc/self/fd/{image.fd}", 0o666)
    mapper = Mapper(image.fd, LENGTH, "shared", lent=lent, user=65534)
    image.mappers.append(mapper)
    inode = os.fstat(image.fd).st_ino
    (vma,) = [v for v in read_maps(mapper.pid).vmas if v.inode == inode]
    ranges = [(vma.start, LENGTH)]
    with pytest.raises(HostError, match="not allowed"):
        watch_missing(mapper.pid, ranges)
    uffd, number = watch_missing(mapper.pid, ranges, device=lent)
    os.close(lent)
    assert is_userfaultfd(mapper.pid, number)
    mapper.touch(0)
    assert _message(uffd) == vma.start
    image.place(0)
    _fill.wake(uffd.fileno(), vma.start, PAGE)
    assert mapper.answer() == 7
