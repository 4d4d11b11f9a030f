"""Readers that use an instant while it is still being saved: the clones of a forked VM.

Pages go to the reader first, then to the output. A page that the reader cannot wait for it asks
for, by a claim like any other, so each page is copied only once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stillframe.capture.ram_capture import RamCapture
from stillframe.model import Manifest
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.still.frames import BytesLike


class Asking(Protocol):
    """A reader's way to get pages sooner; for one thread. Each call passes its pages to
    ``EarlyReader.pages`` and to the output before it returns, and raises what the output raises."""

    def take(self, block: int, first_page: int, pages: int) -> None:
        """Claim and copy the pages of a range that are not claimed yet."""

    def take_spilled(self) -> None:
        """Fetch the pages that the fault thread copied because the guest wrote to them."""


class EarlyReader(Protocol):
    """The calls a reader gets, in this order; all but ``pages`` come from the job's thread."""

    def prepare(self, describe: Callable[[], Manifest]) -> None:
        """Get ready; nothing is protected or captured yet. May be slow.

        Args:
            describe: returns the manifest so far, with the disks that will be frozen.
        """

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        """The instant is fixed and the guest runs again. Must be quick."""

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        """Take a whole RAM section with its packed runs (``still.index_builder.PACKED_RUN``). The
        buffers are valid until this returns. Called from any thread."""

    def check(self) -> None:
        """Raise the error that keeps the reader from working, if any; the job then fails."""

    def stop_asking(self) -> None:
        """Stop asking: all pages are claimed. On return, all pages asked for are in the output."""

    def is_ready(self, timeout_s: float) -> bool:
        """Wait up to the timeout; return whether the reader needs only pages that it has."""

    def finish(self) -> None:
        """The reader has all pages, and ``is_ready`` returned True."""

    def keep(self) -> None:
        """The job is done, and its result is durable."""

    def undo(self) -> None:
        """The job ends. Unless it was kept, stop using the instant: its disks are about to be put
        back as they were. Never raises."""


class NoReader:
    """The null ``EarlyReader``: nothing reads before the end."""

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
        """Return True at once."""
        return True

    def finish(self) -> None:
        """Nothing to do."""

    def keep(self) -> None:
        """Nothing to do."""

    def undo(self) -> None:
        """Nothing to do."""
