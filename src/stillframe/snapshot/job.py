"""The snapshot job: a thread that takes one snapshot, and how to follow and to end it.

States in QEMU's words: ``none → setup → active → completed | failed | cancelled``.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from stillframe.errors import SnapshotCancelled
from stillframe.model import JobState, Statistics
from stillframe.snapshot.progress import Progress

if TYPE_CHECKING:
    from stillframe.snapshot.take import TakenSnapshot


class JobControl:
    """Between the job and the code that takes the snapshot."""

    def __init__(self, on_progress: Callable[[Statistics], None] | None) -> None:
        self.progress = Progress()
        self.cancelled = threading.Event()
        self._on_progress = on_progress

    def tell(self) -> None:
        """Tell the follower how things stand."""
        if self._on_progress is not None:
            self._on_progress(self.progress.statistics())

    def enter(self, state: JobState, phase: str) -> None:
        """Enter a phase.

        Raises:
            SnapshotCancelled: the job was cancelled meanwhile.
        """
        self.check_cancelled()
        self.progress.begin(state, phase)
        self.tell()

    def check_cancelled(self) -> None:
        """Raise SnapshotCancelled if the job was cancelled."""
        if self.cancelled.is_set():
            raise SnapshotCancelled("the snapshot was cancelled", guest_state="running")


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
        progress = self._control.progress
        try:
            result = self._work(self._control)
        except SnapshotCancelled as error:
            progress.begin("cancelled", "cancelled")
            self._future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            progress.begin("failed", "failed")
            self._future.set_exception(error)
        else:
            progress.begin("completed", "completed")
            self._future.set_result(result)

    @property
    def state(self) -> JobState:
        return self._control.progress.state

    @property
    def stats(self) -> Statistics:
        """The numbers now; a finished job keeps its last."""
        return self._control.progress.statistics()

    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        """Ask the job to give up. It ends in ``cancelled`` with the guest running, unless it is
        finished first; ``wait`` then raises SnapshotCancelled. May be called from any thread."""
        self._control.cancelled.set()

    def wait(self, timeout_s: float | None = None) -> TakenSnapshot:
        """Wait for the end.

        Returns:
            The snapshot, complete and synced.

        Raises:
            TimeoutError: it is still under way.
            StillframeError: it failed or was cancelled; ``guest_state`` tells of the guest.
        """
        return self._future.result(timeout_s)

    def __await__(self) -> Generator[object, None, TakenSnapshot]:
        # Costs a tenth of the tool's start, and only this needs it.
        import asyncio

        return asyncio.wrap_future(self._future).__await__()
