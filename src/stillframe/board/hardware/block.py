"""The block device: reads and writes sectors by DMA, on a thread of its own
(ports 0x540 to 0x558, line 5).

It serves a request in pieces. The progress is device state, so a request in flight when the board
is saved continues after the load.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from stillframe.board.hardware.address_space import AddressSpace
from stillframe.board.hardware.device_thread import Finish, Work
from stillframe.board.hardware.disk import Disk
from stillframe.board.hardware.interrupts import LINE_BLOCK, InterruptLines
from stillframe.board.hardware.layout import SECTOR_BYTES
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.fields import StateDescription, u8, u32, u64
from stillframe.errors import MachineError

logger = logging.getLogger(__name__)

IDLE, BUSY, DONE, ERROR = 0, 1, 2, 3
READ, WRITE, FLUSH = 1, 2, 3
SECTORS_LIMIT = 2048
_PIECE_SECTORS = 128
"""64 KiB, some ten microseconds in the page cache."""


class BlockDevice:
    """The device. Guarded by the board lock, except for the disk itself, which its thread uses.

    ``command``: the one in flight, or 0. ``done_sectors``: how much of it is done.
    """

    SECTOR_LOW, SECTOR_HIGH, ADDRESS_LOW, ADDRESS_HIGH, SECTORS, COMMAND, STATUS = range(0, 28, 4)
    COUNT = 28

    def __init__(
        self,
        disk: Disk | None,
        space: AddressSpace,
        lines: InterruptLines,
        kick: Callable[[], None],
    ) -> None:
        """
        Args:
            kick: called when there is work for the device's thread.
        """
        self._disk = disk
        self._space = space
        self._lines = lines
        self._kick = kick
        self._generation = 0
        self._drain_error: OSError | None = None
        self._lost = False
        self.reset()

    def reset(self) -> None:
        self.sector = self.address = 0
        self.count = 0
        self.status = IDLE
        self.command = 0
        self.done_sectors = 0
        # A piece in flight no longer counts.
        self._generation += 1
        self._lost = False

    @property
    def disk_sectors(self) -> int:
        return 0 if self._disk is None else self._disk.sectors

    @property
    def undrained(self) -> OSError | None:
        """The error that keeps the disk's cache from being written back, or None."""
        dirty = self._disk is not None and self._disk.dirty_bytes
        return self._drain_error if dirty else None

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        if offset != self.STATUS:
            return 0
        status = self.status
        if status in (DONE, ERROR):
            self.status = IDLE
        return status

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        if self.status == BUSY:
            return
        if offset == self.SECTOR_LOW:
            self.sector = self.sector >> 32 << 32 | value
        elif offset == self.SECTOR_HIGH:
            self.sector = value << 32 | self.sector & 0xFFFFFFFF
        elif offset == self.ADDRESS_LOW:
            self.address = self.address >> 32 << 32 | value
        elif offset == self.ADDRESS_HIGH:
            self.address = value << 32 | self.address & 0xFFFFFFFF
        elif offset == self.SECTORS:
            self.count = value
        elif offset == self.COMMAND:
            self._start(value)

    def _start(self, command: int) -> None:
        self.command = command
        self.done_sectors = 0
        self.status = BUSY
        self._drain_error = None
        if self._can_start():
            self._kick()
        else:
            self._end(ERROR)

    def _can_start(self) -> bool:
        if self._disk is None or self.command not in (READ, WRITE, FLUSH):
            return False
        if self.command == FLUSH:
            return True
        return (
            0 < self.count <= SECTORS_LIMIT
            and self.sector + self.count <= self._disk.sectors
            and self._space.locate(self.address, self.count * SECTOR_BYTES) is not None
        )

    def _end(self, status: int) -> None:
        self.status = status
        self.command = 0
        self._lines.raise_line(LINE_BLOCK)

    # For the device's thread

    def next_work(self, *, running: bool) -> Work | None:
        disk = self._disk
        if disk is None or not disk.active:
            return None
        if running and self.status == BUSY:
            return self._request(disk)
        # Write back when idle, and always when the board stops. After an error, try again
        # only once a request or ``activate`` has come.
        if disk.dirty_bytes and self._drain_error is None:
            return lambda: self._drain(disk)
        return None

    def _request(self, disk: Disk) -> Work:
        generation, command = self._generation, self.command
        sector = self.sector + self.done_sectors
        count = min(self.count - self.done_sectors, _PIECE_SECTORS)
        place = self._space.locate(
            self.address + self.done_sectors * SECTOR_BYTES, count * SECTOR_BYTES
        )

        def work() -> Finish:
            error: OSError | None = None
            try:
                if command == FLUSH:
                    disk.flush()
                elif place is not None:
                    self._transfer(disk, command, sector, count, *place)
            except OSError as caught:
                error = caught
            return lambda: self._piece_done(generation, count, error)

        return work

    def _transfer(
        self,
        disk: Disk,
        command: int,
        sector: int,
        count: int,
        ram: GuestRam,
        offset_bytes: int,
    ) -> None:
        if command == READ:
            disk.read(sector, count, ram, offset_bytes)
            return
        data = ram.read(offset_bytes, count * SECTOR_BYTES)
        # Check after the read, which may have waited for a page until ``lose`` was called.
        if self._lost:
            raise OSError(errno.EIO, "guest RAM is lost")
        disk.write(sector, data)

    def _piece_done(self, generation: int, count: int, error: OSError | None) -> None:
        if error is not None:
            logger.warning("disk: %s", error)
        if generation != self._generation:
            return
        if error is not None:
            self._end(ERROR)
        elif self.command == FLUSH:
            self._end(DONE)
        else:
            self.done_sectors += count
            if self.done_sectors >= self.count:
                self._end(DONE)

    def _drain(self, disk: Disk) -> Finish:
        error: OSError | None = None
        try:
            disk.drain()
        except OSError as caught:
            error = caught

        def finish() -> None:
            self._drain_error = error
            if error is not None:
                logger.warning("disk: its cache cannot be written back: %s", error)

        return finish

    # For the board

    def lose(self) -> None:
        """Keep what is read from guest RAM off the disk until a reset: it is not the guest's data.
        Callable while the thread works, and without the board lock, which may be held for as long
        as a thread waits for a page."""
        self._lost = True

    # For the board, while the thread is quiet

    def activate(self) -> None:
        """Take the disk's file back, if it was given up. Raises HostError."""
        self._drain_error = None
        if self._disk is not None:
            self._disk.open()

    def inactivate(self) -> None:
        """Write everything to the medium and give the file up for another machine to open.

        Raises:
            MachineError: the disk cannot be written; the file is kept.
        """
        if self._disk is None or not self._disk.active:
            return
        try:
            self._disk.flush()
        except OSError as error:
            raise MachineError(
                f"the disk {self._disk.path} cannot be written",
                why=str(error),
                guest_state="paused",
            ) from error
        self._disk.close()

    def check(self) -> None:
        """Raise ValueError if the registers cannot be this device's."""
        if self.status > ERROR:
            raise ValueError(f"it has no status {self.status}")
        if self.status != BUSY:
            if self.command:
                raise ValueError(f"command {self.command} is under way with status {self.status}")
        elif not self._can_start() or self.done_sectors > self.count:
            raise ValueError(
                f"it cannot execute command {self.command} on {self.count} sectors from "
                f"{self.sector}; the disk has {self.disk_sectors}"
            )

    def close(self) -> None:
        """Write the cache back as far as possible, and close the file; never raises."""
        if self._disk is None:
            return
        if self._disk.active:
            try:
                self._disk.drain()
            except OSError as error:
                logger.warning("disk: its last writes are lost: %s", error)
        self._disk.close()


def _save(device: BlockDevice) -> None:
    error = device.undrained
    if error is not None:
        raise MachineError(
            "the disk's last writes cannot be saved", why=str(error), guest_state="paused"
        )


def _loaded(device: BlockDevice, version_id: int) -> None:
    device.check()


BLOCK = StateDescription(
    name="block",
    version_id=1,
    minimum_version_id=1,
    fields=(
        u64("sector"),
        u64("address"),
        u32("count"),
        u8("status"),
        u8("command"),
        u32("done_sectors"),
    ),
    pre_save=_save,
    post_load=_loaded,
)
