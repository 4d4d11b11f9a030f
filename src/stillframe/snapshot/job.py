"""The snapshot job: a thread that takes one snapshot, and the means to follow and cancel it.

States, with QEMU's names: ``none → setup → active → completed | failed | cancelled``.
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
    """The interface between a job and the code that does its work.

    Args:
        on_progress: called with the numbers.
        on_state: called on each change of state; it must be quick and not call back.

    Attributes:
        limit: on the write rate; may be changed at any time.
        cancelled: set when the job must give up.
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
        """Report the current numbers to ``on_progress``."""
        if self._on_progress is not None:
            self._on_progress(self.progress.statistics())

    def enter(self, state: JobState, phase: str) -> None:
        """Enter a phase, and its state.

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
        """Ask the job to give up, from any thread; return whether it will end as cancelled."""
        if not self._states.cancel():
            return False
        self.cancelled.set()
        return True

    def commit(self) -> None:
        """Pass the point of no return: from here on ``cancel`` has no effect.

        Raises:
            SnapshotCancelled: the job was cancelled before.
        """
        if not self._states.commit():
            raise SnapshotCancelled("the snapshot was cancelled", guest_state="running")

    def end(self, *, failed: bool) -> JobState:
        """Enter the final state, after all cleanup."""
        state = self._states.end(failed=failed)
        self.progress.end(state)
        return state


class SnapshotJob:
    """A running snapshot, made by ``api.take``.

    Wait for it with ``wait`` in a thread, or with ``await job`` in asyncio. The job has its own
    thread, so the event loop is not blocked.
    """

    def __init__(
        self,
        work: Callable[[JobControl], TakenSnapshot],
        *,
        on_progress: Callable[[Statistics], None] | None = None,
    ) -> None:
        """Start the job's thread.

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
        except BaseException as error:  # noqa: BLE001 - wait() raises it
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
        """The current numbers; a finished job keeps its last ones."""
        return self._control.progress.statistics()

    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        """Ask the job to give up; callable from any thread. Unless it completes first, it ends as
        ``cancelled`` with the guest running, and ``wait`` raises SnapshotCancelled."""
        self._control.cancel()

    def wait(self, timeout_s: float | None = None) -> TakenSnapshot:
        """Wait for the end.

        Returns:
            The snapshot, complete and synced.

        Raises:
            TimeoutError: the job is still running.
            StillframeError: it failed or was cancelled; ``guest_state`` says what the guest does.
        """
        return self._future.result(timeout_s)

    def finish(self) -> TakenSnapshot:
        """As :meth:`wait`; on any exception, cancel the job and wait for its end."""
        try:
            return self.wait()
        except BaseException:
            self.cancel()
            with suppress(StillframeError):
                self.wait()
            raise

    def __await__(self) -> Generator[object, None, TakenSnapshot]:
        # Imported only here: asyncio takes a tenth of the tool's start-up time.
        import asyncio

        return asyncio.wrap_future(self._future).__await__()
