"""Who uses the instant while it is being saved: clones of a VM that is forked.

Its pages go to the reader first, then to the output. What the reader cannot wait for it asks for:
by a claim like any other, so each page is copied once, whoever wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stillframe.capture.ram_capture import RamCapture
from stillframe.model import Manifest
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.still.frames import BytesLike


class Asking(Protocol):
    """How a reader gets pages sooner; for one thread. What comes goes to ``EarlyReader.pages`` and
    to the output before this returns. Both raise what the output raises."""

    def take(self, block: int, first_page: int, pages: int) -> None:
        """Those of a range that nobody has claimed yet."""

    def take_spilled(self) -> None:
        """What the guest's own writes made the fault thread copy."""


class EarlyReader(Protocol):
    """In the order of the calls; all but ``pages`` come from the job's thread."""

    def prepare(self, describe: Callable[[], Manifest]) -> None:
        """Get ready; nothing is protected, nothing was captured yet. May take its time.

        Args:
            describe: the manifest as far as it is known, with the disks that will be frozen.
        """

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """The instant is fixed and the guest goes on. Must be quick."""

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        """A whole section of RAM with its packed runs (``still.index_builder.PACKED_RUN``), valid
        until this returns; from any thread."""

    def check(self) -> None:
        """Raise what keeps the reader from its work: the job fails then."""

    def stop_asking(self) -> None:
        """All pages are claimed: ask no more. What was asked for is in the output afterwards."""

    def is_ready(self, timeout_s: float) -> bool:
        """Whether it needs nothing more than the pages that it has; waits so long for that."""

    def finish(self) -> None:
        """It has all pages, and is ready."""

    def keep(self) -> None:
        """The job is done, with all that belongs to it."""

    def undo(self) -> None:
        """The job ends. Unless it was kept, use nothing of the instant from here on: its disks go
        back to what they were. Never raises."""


class NoReader:
    """Nobody reads before the end."""

    def prepare(self, describe: Callable[[], Manifest]) -> None:
        """Nothing to do."""

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """Nothing to do."""

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        """Nothing to do."""

    def check(self) -> None:
        """Nothing to do."""

    def stop_asking(self) -> None:
        """Nothing to do."""

    def is_ready(self, timeout_s: float) -> bool:
        """It is."""
        return True

    def finish(self) -> None:
        """Nothing to do."""

    def keep(self) -> None:
        """Nothing to do."""

    def undo(self) -> None:
        """Nothing to do."""
