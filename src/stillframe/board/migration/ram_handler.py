"""The handler of the ``ram`` section: passes calls on to the current sender or loader of RAM.

Source: QEMU ``migration/ram.c``: savevm_ram_handlers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stillframe.board.migration.ram_loader import RamLoader
from stillframe.board.state.handlers import Output, SaveStateHandler
from stillframe.errors import DataError, InternalError
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.writer import ram_block_list, ram_eos


class RamSender(Protocol):
    """A source of page records. For one thread."""

    @property
    def in_postcopy(self) -> bool:
        """Whether the guest already runs at the destination."""

    def batch(self, out: Output) -> bool:
        """Write some records; return True if none are left for now."""


class RamHandler(SaveStateHandler):
    """The handler that saves and loads all RAM blocks."""

    iterable = True

    def __init__(self) -> None:
        self.sender: RamSender | None = None
        """Set before the saver's ``iterate``."""
        self.loader: RamLoader | None = None
        """Set while an incoming stream loads."""
        self.blocks: Sequence[tuple[str, int]] = ()
        """(idstr, length in bytes) of all blocks, for ``setup``; empty if nothing is sent."""

    def is_active(self) -> bool:
        return bool(self.blocks)

    def has_postcopy(self) -> bool:
        """Return whether the remaining RAM may follow after the switch-over."""
        return self.sender is not None and self.sender.in_postcopy

    def setup(self, out: Output) -> None:
        """Write the block list."""
        out.write(ram_block_list(self.blocks))

    def iterate(self, out: Output) -> bool:
        """Write some pages; return True if none are left for now."""
        nothing_left = self._sender().batch(out)
        out.write(ram_eos())
        return nothing_left

    def complete_precopy(self, out: Output) -> None:
        """Write all remaining pages; the guest is stopped."""
        self._rest(out)

    def complete_postcopy(self, out: Output) -> None:
        """Tell the destination that nothing is left; the migration has sent all pages by now."""
        self._rest(out)

    def _rest(self, out: Output) -> None:
        """Write all that is left, in one payload."""
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
        """Load the payload of any of its sections.

        Raises:
            DataError: it is damaged or of another machine, or no load is under way.
        """
        if self.loader is None:
            raise DataError("this stream may not hold RAM")
        self.loader.load(source)

    def cleanup(self) -> None:
        """Forget the sender and its blocks."""
        self.sender = None
        self.blocks = ()
