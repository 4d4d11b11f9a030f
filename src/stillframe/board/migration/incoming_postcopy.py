"""The destination's part of postcopy: the guest runs while its RAM still arrives.

Source: QEMU ``migration/savevm.c``: loadvm_postcopy_handle_*, postcopy_ram_listen_thread;
``migration/postcopy-ram.c``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

from stillframe.board.memory.missing_pages import MissingPages
from stillframe.board.memory.own_protection import Preference
from stillframe.board.migration.capabilities import POSTCOPY_RAM
from stillframe.board.migration.ram_loader import RamLoader
from stillframe.board.migration.return_path import ReturnPathWriter
from stillframe.board.migration.stream_commands import check_advise, read_discard
from stillframe.errors import DataError, HostError, InternalError, SinkError, StillframeError
from stillframe.model import TARGET_PAGE_BYTES

Stage = Literal["none", "advised", "listening", "running"]


def probe_missing_pages(prefer: Preference) -> None:
    """Check that this host can fill RAM on demand.

    Raises:
        HostError: it cannot; the message says why.
    """
    if prefer == "mprotect":
        raise HostError(
            "pages cannot be waited for with mprotect",
            why="it protects pages that are there, and knows nothing of missing ones",
            remedy="allow userfaultfd",
        )
    MissingPages.probe()


class IncomingPostcopy:
    """The postcopy commands, taken in QEMU's order: advise, discards, listen, run.

    Args:
        load_rest: loads the rest of the stream, up to its end; called in its own thread.
        start_guest: resumes the guest if it ran at the source.
    """

    def __init__(
        self,
        ram: RamLoader,
        capabilities: Mapping[str, bool],
        protection: Preference,
        *,
        load_rest: Callable[[], None],
        start_guest: Callable[[], None],
    ) -> None:
        self._ram = ram
        self._allowed = capabilities[POSTCOPY_RAM]
        self._protection: Preference = protection
        self._load_rest = load_rest
        self._start_guest = start_guest
        self._stage: Stage = "none"
        self._missing: MissingPages | None = None
        self._reply: ReturnPathWriter | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def _enter(self, stage: Stage, *, only_from: Stage, command: str) -> None:
        if self._stage != only_from:
            raise DataError(f"{command} in wrong postcopy state ({self._stage})")
        self._stage = stage

    def advise(self, data: bytes) -> None:
        """Prepare for postcopy, which may follow.

        Raises:
            DataError: the command is out of order, the capability is off, or page sizes differ.
            HostError: this host cannot fill RAM on demand.
        """
        self._enter("advised", only_from="none", command="CMD_POSTCOPY_ADVISE")
        if not self._allowed:
            raise DataError(
                "RAM postcopy is disabled but have 16 byte advise",
                remedy="start the destination with --incoming defer, set capability postcopy-ram "
                "there too, and then migrate-incoming",
            )
        check_advise(data)
        probe_missing_pages(self._protection)
        self._ram.page_sizes = True

    def discard(self, data: bytes) -> None:
        """Discard old pages, which are missing from then on.

        Raises:
            DataError: the command is malformed or out of order.
        """
        if self._stage != "advised":
            raise DataError(f"CMD_POSTCOPY_RAM_DISCARD in wrong postcopy state ({self._stage})")
        idstr, runs = read_discard(data)
        block = self._ram.index_of(idstr)
        for first_page, pages in runs:
            self._ram.discard(block, first_page, pages)

    def listen(self, reply: ReturnPathWriter) -> None:
        """Make every access to a missing page wait for it, and load the rest in another thread.

        Raises:
            DataError: the command is out of order. HostError, BusyError: RAM cannot be watched.
        """
        self._enter("listening", only_from="advised", command="CMD_POSTCOPY_LISTEN")
        self._reply = reply
        self._missing = MissingPages(self._ram.rams, self._on_missing)
        # After the assignment: ``_on_missing`` reads ``_missing``.
        self._missing.start()
        self._ram.filler = self._missing
        self._thread = threading.Thread(
            target=self._listen, name="stillframe-postcopy", daemon=True
        )
        self._thread.start()

    def _on_missing(self, block: int, page: int) -> None:
        """Request a page that a thread waits for. Runs in the thread of ``MissingPages``."""
        missing, reply = self._missing, self._reply
        if missing is None or reply is None:
            return
        offset_bytes = page * TARGET_PAGE_BYTES
        if self._ram.received(block, page):
            # It arrived as a zero page, which populated nothing.
            missing.place_zeroes(block, offset_bytes, TARGET_PAGE_BYTES)
            return
        # If the source is gone, the thread that reads from it notices.
        with suppress(SinkError):
            reply.request_pages(self._ram.rams[block].idstr, offset_bytes, TARGET_PAGE_BYTES)

    def _listen(self) -> None:
        try:
            self._load_rest()
            self._ram.check_complete()
        except BaseException as error:  # noqa: BLE001 - ``wait_for_rest`` raises it
            self._failure = error

    def run(self) -> None:
        """Start the guest, now that the devices are loaded.

        Raises:
            DataError: the command is out of order.
        """
        self._enter("running", only_from="listening", command="CMD_POSTCOPY_RUN")
        self._start_guest()

    @property
    def started(self) -> bool:
        """Whether the guest may already run."""
        return self._stage == "running"

    def wait_for_rest(self) -> None:
        """Wait until all RAM has arrived.

        Raises:
            StillframeError: it never will; the guest waits for missing pages, or soon will.
        """
        if self._thread is not None:
            self._thread.join()
        if isinstance(self._failure, StillframeError):
            raise self._failure
        if self._failure is not None:
            raise InternalError("load of migration failed", why=repr(self._failure))

    def close(self) -> None:
        """Stop watching RAM; threads that still wait go on, and read zeroes. Never raises.

        The channel must be at its end or interrupted, since this joins the loading thread.
        """
        if self._thread is not None:
            self._thread.join()
        missing, self._missing = self._missing, None
        if missing is not None:
            missing.close()
