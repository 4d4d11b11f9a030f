"""The ``ram`` section: hands the framework's calls to whatever sends or loads RAM now.

Source: QEMU ``migration/ram.c``: savevm_ram_handlers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stillframe.errors import DataError, InternalError
from stillframe.memory.ram_capture import RamCapture
from stillframe.migration.counters import TARGET_PAGE_BYTES, Counters
from stillframe.migration.ram_loader import RamLoader
from stillframe.snapshot import faultpoints
from stillframe.vmstate.save_state import Output
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.writer import ram_block_list, ram_eos, ram_part_prefix, ram_part_suffix


class RamSender(Protocol):
    """Gives page records. For one thread."""

    @property
    def in_postcopy(self) -> bool:
        """Whether the guest runs at the destination already."""

    def batch(self, out: Output) -> bool:
        """Write some records; True if there are no more now."""


class CapturedRam:
    """RAM as it was at one instant: the batches of a RAM capture's worker.

    The sweep in address order and the pages that faulted come out of the same worker, faulted
    ones first when their spill fills.
    """

    in_postcopy = False
    _SECTION_ID = 2
    """Any; the framework writes the section's own header and footer."""

    def __init__(self, capture: RamCapture, counters: Counters) -> None:
        self._capture = capture
        self._worker = capture.worker(self._SECTION_ID)
        self._counters = counters
        self._head_bytes = len(ram_part_prefix(self._SECTION_ID))
        self._tail_bytes = len(ram_part_suffix(self._SECTION_ID))

    def batch(self, out: Output) -> bool:
        """Write the next batch's records; True if the worker has none now."""
        length_bytes = self._worker.next()
        if not length_bytes:
            return True
        faultpoints.reach("first-batch")
        out.write(self._worker.raw[self._head_bytes : length_bytes - self._tail_bytes])
        self._count()
        return False

    def _count(self) -> None:
        numbers = self._capture.statistics()
        counters = self._counters
        counters.zero_pages = int(numbers["pages_zero"])
        counters.data_pages = int(numbers["pages_data"])
        counters.remaining_bytes = max(0, counters.ram_bytes - counters.pages * TARGET_PAGE_BYTES)


class RamHandler:
    """A save-state handler (``vmstate.save_state.SaveStateHandler``) for all RAM blocks."""

    iterable = True

    def __init__(self) -> None:
        self.sender: RamSender | None = None
        """Set before the saver's ``iterate``."""
        self.loader: RamLoader | None = None
        """Set while an incoming stream is loaded."""
        self.blocks: Sequence[tuple[str, int]] = ()
        """(idstr, length in bytes) of all blocks, for ``setup``; empty: nothing to migrate."""

    def is_active(self) -> bool:
        return bool(self.blocks)

    def has_postcopy(self) -> bool:
        """Whether what is left may follow after the switch-over."""
        return self.sender is not None and self.sender.in_postcopy

    def setup(self, out: Output) -> None:
        """The block list."""
        out.write(ram_block_list(self.blocks))

    def iterate(self, out: Output) -> bool:
        """Some pages; True if there are no more now."""
        nothing_left = self._sender().batch(out)
        out.write(ram_eos())
        return nothing_left

    def complete_precopy(self, out: Output) -> None:
        """All pages that are left; the guest stands still."""
        self._rest(out)

    def complete_postcopy(self, out: Output) -> None:
        """Nothing is left by now; the section tells the destination so."""
        self._rest(out)

    def _rest(self, out: Output) -> None:
        """All that is left, in one payload."""
        sender = self._sender()
        while not sender.batch(out):
            pass
        out.write(ram_eos())

    def _sender(self) -> RamSender:
        if self.sender is None:
            raise InternalError("RAM is asked for, and nothing sends it")
        return self.sender

    def save(self, out: Output) -> None:
        raise InternalError("RAM is saved in parts")

    def load(self, source: StreamSource, version_id: int) -> None:
        """The payload of any of its sections.

        Raises:
            DataError: damaged, of another machine, or nothing is being loaded.
        """
        if self.loader is None:
            raise DataError("this stream may not hold RAM")
        self.loader.load(source)

    def cleanup(self) -> None:
        """Forget what sent or loaded RAM."""
        self.sender = None
        self.blocks = ()
