"""The destination's part of postcopy: the guest runs while its RAM still comes.

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
    """Whether RAM can be filled on demand here.

    Raises:
        HostError: it cannot; the message says what is in the way.
    """
    if prefer == "mprotect":
        raise HostError(
            "pages cannot be waited for with mprotect",
            why="it protects pages that are there, and knows nothing of missing ones",
            remedy="allow userfaultfd",
        )
    MissingPages.probe()


class IncomingPostcopy:
    """Takes its commands in QEMU's order: advise, discards, listen, run.

    Args:
        load_rest: loads what follows in the stream, up to its end; in a thread of its own.
        start_guest: lets the guest run, if it ran at the source.
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
        """Postcopy may follow.

        Raises:
            DataError: the capability is off, or page sizes differ. HostError: not here.
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
        """Old pages are missing again.

        Raises:
            DataError: malformed, or not in its turn.
        """
        if self._stage != "advised":
            raise DataError(f"CMD_POSTCOPY_RAM_DISCARD in wrong postcopy state ({self._stage})")
        idstr, runs = read_discard(data)
        block = self._ram.index_of(idstr)
        for first_page, pages in runs:
            self._ram.discard(block, first_page, pages)

    def listen(self, reply: ReturnPathWriter) -> None:
        """From here on whoever touches a page that has not come waits for it, and the rest of
        the stream is loaded by another thread.

        Raises:
            DataError: not in its turn. HostError, BusyError: RAM cannot be watched.
        """
        self._enter("listening", only_from="advised", command="CMD_POSTCOPY_LISTEN")
        self._reply = reply
        self._missing = MissingPages(self._ram.rams, self._on_missing)
        # Who is told asks for it by this attribute.
        self._missing.start()
        self._ram.filler = self._missing
        self._thread = threading.Thread(
            target=self._listen, name="stillframe-postcopy", daemon=True
        )
        self._thread.start()

    def _on_missing(self, block: int, page: int) -> None:
        """Somebody waits for a page. In the thread of MissingPages."""
        missing, reply = self._missing, self._reply
        if missing is None or reply is None:
            return
        offset_bytes = page * TARGET_PAGE_BYTES
        if self._ram.received(block, page):
            # It came as a page of zeroes, for which nothing was populated.
            missing.place_zeroes(block, offset_bytes, TARGET_PAGE_BYTES)
            return
        # A source that is gone is noticed by who reads from it.
        with suppress(SinkError):
            reply.request_pages(self._ram.rams[block].idstr, offset_bytes, TARGET_PAGE_BYTES)

    def _listen(self) -> None:
        try:
            self._load_rest()
            self._ram.check_complete()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._failure = error

    def run(self) -> None:
        """The devices are loaded: let the guest run.

        Raises:
            DataError: not in its turn.
        """
        self._enter("running", only_from="listening", command="CMD_POSTCOPY_RUN")
        self._start_guest()

    @property
    def started(self) -> bool:
        """Whether the guest may run already."""
        return self._stage == "running"

    def wait_for_rest(self) -> None:
        """Until all RAM has come.

        Raises:
            StillframeError: it never will; the guest waits for pages, or is going to.
        """
        if self._thread is not None:
            self._thread.join()
        if isinstance(self._failure, StillframeError):
            raise self._failure
        if self._failure is not None:
            raise InternalError("load of migration failed", why=repr(self._failure))

    def close(self) -> None:
        """Watch RAM no more; who still waits goes on, and reads zeroes. Never raises.

        The channel must be at its end, or interrupted: the rest's load is waited for.
        """
        if self._thread is not None:
            self._thread.join()
        missing, self._missing = self._missing, None
        if missing is not None:
            missing.close()
