"""The ``ram`` section: hands the framework's calls to whatever sends or loads RAM now.

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
    """Gives page records. For one thread."""

    @property
    def in_postcopy(self) -> bool:
        """Whether the guest runs at the destination already."""

    def batch(self, out: Output) -> bool:
        """Write some records; True if there are no more now."""


class RamHandler(SaveStateHandler):
    """Saves and loads all RAM blocks."""

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
        """All pages that are left; the guest is stopped."""
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
