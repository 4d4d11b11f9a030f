"""The source's end of the return path: a thread that listens to the destination."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stillframe.board.migration.return_path import PageRequest, Pong, Shut, read_message
from stillframe.errors import DataError, InternalError, SinkError, StillframeError
from stillframe.vmstate.source import Source, StreamSource


class SourceLink:
    """A thread that listens to one destination until it sends SHUT or is gone.

    Args:
        replies: the return path; an interrupted read returns no bytes.
        on_request: takes page requests, in the link's thread; may raise DataError.
    """

    def __init__(self, replies: Source, on_request: Callable[[PageRequest], None]) -> None:
        self._source = StreamSource(replies, live=True)
        self._on_request = on_request
        self._changed = threading.Condition()
        self._pongs: set[int] = set()
        self._answered = False
        self._shut: Shut | None = None
        self._failure: StillframeError | None = None
        self._hung_up = False
        self.requested = threading.Event()
        """Set when a page was requested or the link ended; the sender clears it."""
        self._thread = threading.Thread(
            target=self._listen, name="stillframe-return-path", daemon=True
        )
        self._thread.start()

    def _listen(self) -> None:
        failure: StillframeError | None = None
        shut: Shut | None = None
        try:
            while shut is None:
                if self._source.peek() is None:
                    self._hung_up = True
                    raise SinkError(
                        "the destination hung up",
                        why="it has not said that it has loaded the guest",
                    )
                match read_message(self._source):
                    case Shut() as shut:
                        pass
                    case Pong(number):
                        with self._changed:
                            self._pongs.add(number)
                            self._answered = True
                            self._changed.notify_all()
                    case PageRequest() as request:
                        self._on_request(request)
                        self.requested.set()
        except StillframeError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - ``check`` raises it
            failure = InternalError("the return path failed", why=repr(error))
        if shut is not None and shut.error:
            failure = SinkError(
                f"Sibling indicated error {shut.error}",
                why="the destination could not load the guest",
                remedy="its own query-migrate tells why",
            )
        with self._changed:
            self._shut = shut
            self._failure = failure
            self._changed.notify_all()
        self.requested.set()  # wake a sender that waits between batches

    @property
    def answered(self) -> bool:
        """Whether the destination has ever answered a PING."""
        with self._changed:
            return self._answered

    def wait_answer(self, timeout_s: float) -> bool:
        """Return whether the destination answers PINGs; a program that only stores does not.

        Args:
            timeout_s: how long to wait for the first answer.

        Raises:
            SinkError, DataError: as ``check``.
        """
        with self._changed:
            if not self._answered and self._failure is None:
                self._changed.wait(timeout_s)
            self._check_locked()
            return self._answered

    @property
    def refused(self) -> bool:
        """Whether the destination reported a failed load: the guest does not run there."""
        with self._changed:
            return self._shut is not None and self._shut.error != 0

    def wait_hung_up(self, timeout_s: float) -> bool:
        """Return whether the destination has hung up, waiting for it up to ``timeout_s``.

        A program that only stores may hang up at the stream's end.

        Raises:
            SinkError, DataError: the destination failed in another way.
        """
        with self._changed:
            if self._failure is None and self._shut is None:
                self._changed.wait(timeout_s)
            if not self._hung_up:
                self._check_locked()
            return self._hung_up

    def check(self) -> None:
        """Raise the destination's failure, if there is one.

        Raises:
            SinkError: the destination is gone, or failed to load.
            DataError: it sent a malformed message.
        """
        with self._changed:
            self._check_locked()

    def _check_locked(self) -> None:
        if self._failure is not None:
            raise self._failure

    def wait_pong(self, number: int) -> None:
        """Wait for the PONG with this number, once per number.

        Raises:
            SinkError, DataError: as ``check``.
        """
        with self._changed:
            while number not in self._pongs:
                self._check_locked()
                if self._shut is not None:
                    raise DataError("the destination said that it is done before it was")
                self._changed.wait()
            self._pongs.remove(number)

    def wait_done(self) -> None:
        """Wait until the destination confirms that it has loaded everything.

        Raises:
            SinkError, DataError: as ``check``.
        """
        with self._changed:
            while self._shut is None:
                self._check_locked()
                self._changed.wait()
            self._check_locked()

    def end(self) -> None:
        """Join the thread, once the channel is interrupted or the destination is done."""
        self._thread.join()
