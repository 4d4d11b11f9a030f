"""The snapshot job: a thread that takes one snapshot, and how to follow and to end it.

States in QEMU's words: ``none → setup → active → completed | failed | cancelled``.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Generator
from contextlib import suppress

from stillframe.errors import SnapshotCancelled, StillframeError
from stillframe.model import JobState, Statistics
from stillframe.snapshot.job_state import StateMachine
from stillframe.snapshot.progress import Progress
from stillframe.snapshot.rate import BandwidthLimit
from stillframe.snapshot.taken import TakenSnapshot


class JobControl:
    """Between the job and the code that does its work.

    Args:
        on_progress: follows the numbers.
        on_state: told each change of state; it must be quick and not call back.

    Attributes:
        limit: on what is written; may be changed at any time.
        cancelled: set when the job is to be given up.
    """

    def __init__(
        self,
        on_progress: Callable[[Statistics], None] | None = None,
        *,
        on_state: Callable[[JobState], None] | None = None,
    ) -> None:
        self._states = StateMachine(on_state)
        self.progress = Progress(self._states)
        self.limit = BandwidthLimit(None)
        self.cancelled = threading.Event()
        self._on_progress = on_progress

    @property
    def state(self) -> JobState:
        return self._states.value

    @property
    def under_way(self) -> bool:
        return self._states.under_way

    def tell(self) -> None:
        """Tell the follower how things stand."""
        if self._on_progress is not None:
            self._on_progress(self.progress.statistics())

    def enter(self, state: JobState, phase: str) -> None:
        """Enter a phase.

        Raises:
            SnapshotCancelled: the job was cancelled meanwhile.
        """
        if not self._states.enter(state):
            raise SnapshotCancelled("the snapshot was cancelled", guest_state="running")
        self.progress.begin(phase)
        self.tell()

    def check_cancelled(self) -> None:
        """Raise SnapshotCancelled if the job was cancelled."""
        if self.cancelled.is_set():
            raise SnapshotCancelled("the snapshot was cancelled", guest_state="running")

    def cancel(self) -> bool:
        """Ask for the job to be given up, from any thread; whether it will end as cancelled."""
        if not self._states.cancel():
            return False
        self.cancelled.set()
        return True

    def commit(self) -> None:
        """Pass the point of no return: from here on no ``cancel`` succeeds.

        Raises:
            SnapshotCancelled: it was cancelled before.
        """
        if not self._states.commit():
            raise SnapshotCancelled("the snapshot was cancelled", guest_state="running")

    def end(self, *, failed: bool) -> JobState:
        """The last change of state: everything is cleaned up."""
        state = self._states.end(failed=failed)
        self.progress.end(state)
        return state


class SnapshotJob:
    """A snapshot under way. Made by ``api.take``.

    Follow it from a thread with ``wait`` or from asyncio with ``await job``; neither takes part
    in the work, so the event loop is not blocked.
    """

    def __init__(
        self,
        work: Callable[[JobControl], TakenSnapshot],
        *,
        on_progress: Callable[[Statistics], None] | None = None,
    ) -> None:
        """Start at once.

        Args:
            work: takes the snapshot; see ``snapshot.take``.
            on_progress: called from the job's thread about ten times a second; must be quick.
        """
        self._control = JobControl(on_progress)
        self._future: concurrent.futures.Future[TakenSnapshot] = concurrent.futures.Future()
        self._work = work
        self._thread = threading.Thread(target=self._run, name="stillframe-job", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._future.set_running_or_notify_cancel()
        try:
            result = self._work(self._control)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._control.end(failed=True)
            self._future.set_exception(error)
        else:
            self._control.end(failed=False)
            self._future.set_result(result)

    @property
    def state(self) -> JobState:
        return self._control.state

    @property
    def stats(self) -> Statistics:
        """The numbers now; a finished job keeps its last."""
        return self._control.progress.statistics()

    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        """Ask the job to give up. It ends in ``cancelled`` with the guest running, unless it is
        finished first; ``wait`` then raises SnapshotCancelled. May be called from any thread."""
        self._control.cancel()

    def wait(self, timeout_s: float | None = None) -> TakenSnapshot:
        """Wait for the end.

        Returns:
            The snapshot, complete and synced.

        Raises:
            TimeoutError: it is still under way.
            StillframeError: it failed or was cancelled; ``guest_state`` tells of the guest.
        """
        return self._future.result(timeout_s)

    def finish(self) -> TakenSnapshot:
        """As :meth:`wait`; whatever interrupts that cancels the job, and it has ended then."""
        try:
            return self.wait()
        except BaseException:
            self.cancel()
            with suppress(StillframeError):
                self.wait()
            raise

    def __await__(self) -> Generator[object, None, TakenSnapshot]:
        # Costs a tenth of the tool's start, and only this needs it.
        import asyncio

        return asyncio.wrap_future(self._future).__await__()
