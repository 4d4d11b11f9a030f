"""RAM of this process whose pages come later: a thread that touches one waits until it is placed.

This uses userfaultfd's missing mode over the memfds of guest RAM. A page is missing while the memfd
has a hole there (``GuestRam.clear`` makes one).
Source: Linux ``Documentation/admin-guide/mm/userfaultfd.rst``; QEMU ``migration/postcopy-ram.c``.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable, Sequence

from stillframe.board.memory import _guest_memory
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.errors import HostError, UsageError
from stillframe.kernel.userfaultfd import MISSING_PAGES, own_userfaultfd
from stillframe.model import TARGET_PAGE_BYTES

_MESSAGE = struct.Struct("=B7xQQQ")  # event, flags, address
_EVENT_PAGEFAULT = 0x12
_MESSAGES = 64

OnMissing = Callable[[int, int], None]
"""Takes the index of the block and the number of the page (of 4 KiB) that a thread waits for,
perhaps several times for one page. It must not raise, and must not touch missing pages itself."""


class MissingPages:
    """Watches blocks and fills their missing pages. Any thread may call ``place``.

    The guest runs meanwhile; a thread that waits for a page does not hold the GIL (``GuestRam``,
    the vCPUs). With a userfaultfd for user mode only, as ordinary users have it, a system call that
    meets a missing page fails with EFAULT: ``GuestRam.read_from`` touches it, then tries again.
    """

    def __init__(self, rams: Sequence[GuestRam], on_missing: OnMissing) -> None:
        """Watch all blocks from now on; ``start`` follows, and begins the calls of ``on_missing``.

        Raises:
            HostError: userfaultfd is not available here, or cannot do this.
            BusyError: a block is being captured, or is watched already.
        """
        self._rams = tuple(rams)
        self._on_missing = on_missing
        self._uffd = own_userfaultfd(MISSING_PAGES)
        self._stop_fd = -1
        try:
            for ram in self._rams:
                self._uffd.register(ram.hva, ram.block().max_length_bytes, MISSING_PAGES)
            self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._uffd.close()
            raise
        self._thread = threading.Thread(
            target=self._serve, name="stillframe-missing-pages", daemon=True
        )

    def start(self) -> None:
        """Call ``on_missing`` from now on, on a thread of its own, also for waits already begun."""
        self._thread.start()

    @staticmethod
    def probe() -> None:
        """Check that this host can watch for missing pages.

        Raises:
            HostError: it cannot; the message says why.
        """
        ram = GuestRam("probe", TARGET_PAGE_BYTES)
        try:
            with own_userfaultfd(MISSING_PAGES) as uffd:
                uffd.register(ram.hva, TARGET_PAGE_BYTES, MISSING_PAGES)
        finally:
            ram.close()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._uffd.fileno(), select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._stop_fd in ready:
                return
            try:
                messages = os.read(self._uffd.fileno(), _MESSAGES * _MESSAGE.size)
            except BlockingIOError:
                continue  # the waiting thread was woken, or killed, meanwhile
            for event, _, address, _ in _MESSAGE.iter_unpack(messages):
                if event == _EVENT_PAGEFAULT:
                    self._tell(address)

    def _tell(self, address: int) -> None:
        for index, ram in enumerate(self._rams):
            if ram.hva <= address < ram.hva + ram.length_bytes:
                self._on_missing(index, (address - ram.hva) // TARGET_PAGE_BYTES)
                return

    def place(self, block: int, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Fill whole pages, and wake the threads that wait for them; pages already there stay.

        Raises:
            UsageError: not whole pages, or outside the block.
            HostError: no memory, or closed or unmapped. Threads that wait for the pages still wait.
        """
        view = memoryview(data).cast("B")
        hva = self._at(block, offset_bytes, len(view))
        self._check(block, _guest_memory.place(self._uffd.fileno(), hva, view))

    def place_zeroes(self, block: int, offset_bytes: int, length_bytes: int) -> None:
        """As ``place``, with zeroes."""
        hva = self._at(block, offset_bytes, length_bytes)
        self._check(block, _guest_memory.place_zeroes(self._uffd.fileno(), hva, length_bytes))

    def _at(self, block: int, offset_bytes: int, length_bytes: int) -> int:
        ram = self._rams[block]
        if (
            offset_bytes % TARGET_PAGE_BYTES
            or length_bytes % TARGET_PAGE_BYTES
            or min(offset_bytes, length_bytes) < 0
            or offset_bytes + length_bytes > ram.length_bytes
        ):
            raise UsageError(
                f"RAM block {ram.idstr} has no {length_bytes} bytes in whole pages "
                f"at offset {offset_bytes:#x}"
            )
        return ram.hva + offset_bytes

    def _check(self, block: int, result: int) -> None:
        if result < 0:
            raise HostError(
                f"pages of RAM block {self._rams[block].idstr} cannot be placed",
                why=os.strerror(-result),
                guest_state="running",
            )

    def close(self) -> None:
        """Stop watching, once no thread places pages any more; not from ``on_missing``.

        Threads that still wait continue, and find zeroes.
        """
        if self._stop_fd < 0:
            return
        os.eventfd_write(self._stop_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._uffd.close()
        os.close(self._stop_fd)
        self._stop_fd = -1
