"""The watch over a VM: keeps it armed, takes snapshots into a store on a schedule, and goes on
whatever happens to the VM, to the store, or to a single snapshot.

The first snapshot of a watch, or after an interruption of the tracking, is compared with the VM's
newest in the store, or is whole; the others contain only what was written since the previous one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from stillframe.errors import RefusedError, SnapshotCancelled, StillframeError, UsageError
from stillframe.machine import Machine
from stillframe.machine.finding import connect
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.housekeeping import Compact, Housekeeping
from stillframe.snapshot.into_store import may_go_on_from, take_into_store
from stillframe.snapshot.job import JobControl, SnapshotJob
from stillframe.snapshot.memory_limit import first_to_be_killed
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.parent import Parent
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.snapshot.taking import Origins
from stillframe.still.snapshot import Snapshot
from stillframe.store.records import vm_name
from stillframe.store.store import Compaction, Store

_POLL_S = 0.2
_GONE_POLL_S = 1.0


class Follower:
    """Receiver of a watch's events, in the watching thread; does nothing unless overridden."""

    def taken(self, snapshot: TakenSnapshot, *, tracked: bool) -> None:
        """A snapshot is durable. ``tracked``: what changed was known without reading RAM."""

    def failed(self, error: StillframeError) -> None:
        """A snapshot, the pruning after it, or a compaction failed; the watch goes on."""

    def interrupted(self, why: str) -> None:
        """Tracking was interrupted; the next snapshot reads RAM to find out what changed."""

    def gone(self, error: StillframeError) -> None:
        """The VM is away; the watch waits for it."""


def watch(
    vm: str | int,
    store: Store,
    options: SnapshotOptions,
    *,
    origins: Origins,
    prune: Callable[[str], object],
    compact: Callable[[str, Callable[[], bool]], Compaction],
    every_s: float,
    count: int | None = None,
    most_away_s: float | None = None,
    stop: threading.Event | None = None,
    follower: Follower | None = None,
) -> int:
    """As ``api.watch``.

    Args:
        prune: called after each snapshot with the VM's name in the store.
        compact: called after that, in the background, with the name and a function that returns
            whether to stop.
    """
    if every_s <= 0:
        raise UsageError(f"a snapshot every {every_s:g} seconds makes no sense")
    if count is not None and count <= 0:
        raise UsageError(f"{count} snapshots make no sense")
    ended = stop or threading.Event()
    name = ""

    def check_ended(_there: float) -> None:
        if ended.is_set():
            raise SnapshotCancelled("the watch was ended", guest_state="running")

    def connected() -> Machine:
        nonlocal name
        origins.await_resident(vm, check_ended)
        with ExitStack() as on_failure:
            machine = on_failure.enter_context(connect(vm))
            name = vm_name(machine.describe())
            on_failure.pop_all()
            return machine

    return Watching(
        connected,
        store,
        options,
        since=lambda machine, parent: Parent(parent, origins.own_pages(machine.pid, parent.id)),
        prune=lambda: prune(name),
        compact=lambda stopped: compact(name, stopped),
        every_s=every_s,
        count=count,
        most_away_s=most_away_s,
        stop=ended,
        follower=follower or Follower(),
    ).run()


class Watching:
    """One watch, for one thread. Guest state: running before, during and after the watch.

    Args:
        connect: connects to the VM; raises NotFoundError or MachineError while it is away.
        since: makes the parent of a snapshot that is compared; see ``into_store.Since``.
        prune: called after each snapshot; then ``compact``, in the background.
        every_s: seconds from the start of one snapshot to the start of the next.
        count: end after this many snapshots; None: never.
        most_away_s: how long the VM may be away after the first snapshot; None: no limit.
        stop: ends the watch; a running snapshot is cancelled.
    """

    def __init__(
        self,
        connect: Callable[[], Machine],
        store: Store,
        options: SnapshotOptions,
        *,
        since: Callable[[Machine, Snapshot], Parent],
        prune: Callable[[], object],
        compact: Compact,
        every_s: float,
        count: int | None,
        most_away_s: float | None,
        stop: threading.Event,
        follower: Follower,
    ) -> None:
        self._connect = connect
        self._store = store
        self._options = options
        self._since = since
        self._prune = prune
        self._housekeeping = Housekeeping(compact)
        self._every_s = every_s
        self._count = count
        self._most_away_s = most_away_s
        self._stop = stop
        self._follower = follower
        self._taken = 0
        self._hold: Hold | None = None

    def run(self) -> int:
        """Watch until ``stop`` is set or ``count`` is reached, then un-protect the VM.

        Returns:
            The number of snapshots taken.

        Raises:
            NotFoundError, MachineError: the VM was away for too long.
            StillframeError: the first snapshot could not be taken.
        """
        due_s = time.monotonic()
        with first_to_be_killed():  # the buffers stay between snapshots
            try:
                while not self._stop.is_set() and self._taken != self._count:
                    if self._rest(due_s):
                        due_s = max(due_s + self._every_s, time.monotonic())
                        self._turn()
            finally:
                self._let_go()
                self._housekeeping.end(give_up=self._taken != self._count)
                self._tell_of_housekeeping()
        return self._taken

    def _rest(self, until_s: float) -> bool:
        """Wait for the time, and check meanwhile that faults are served; False: told to stop."""
        while (left_s := until_s - time.monotonic()) > 0:
            if self._stop.wait(min(left_s, _POLL_S)):
                return False
            if self._hold is not None and (why := self._hold.trouble()):
                # At once, not when the next snapshot is due: perhaps nothing serves the faults.
                self._follower.interrupted(why)
                self._let_go()
        return not self._stop.is_set()

    def _turn(self) -> None:
        try:
            self._check_held()
        except StillframeError as error:
            self._follower.failed(error)
            return
        if self._hold is None and (machine := self._connected()) is not None:
            self._hold = Hold(machine, stay=True)
        hold = self._hold
        if hold is None:
            return
        tracked = hold.last is not None
        try:
            with self._housekeeping.standing_still():
                taken = self._finish(SnapshotJob(lambda control: self._take_into(control, hold)))
        except StillframeError as error:
            if hold.last is None:
                self._let_go()
            if self._stop.is_set():
                return
            if self._taken == 0:
                raise
            self._follower.failed(error)
            return
        self._taken += 1
        self._follower.taken(taken, tracked=tracked)
        try:
            self._prune()
        except StillframeError as error:
            self._follower.failed(error)
        self._tell_of_housekeeping()
        self._housekeeping.begin()

    def _tell_of_housekeeping(self) -> None:
        for error in self._housekeeping.errors():
            self._follower.failed(error)

    def _take_into(self, control: JobControl, hold: Hold) -> TakenSnapshot:
        return take_into_store(
            control,
            hold.machine,
            self._store,
            self._options,
            since=lambda snapshot: self._since(hold.machine, snapshot),
            hold=hold,
        )

    def _finish(self, job: SnapshotJob) -> TakenSnapshot:
        while True:
            try:
                return job.wait(_POLL_S)
            except TimeoutError:
                if job.done():
                    return job.wait()
            except KeyboardInterrupt:  # the job's thread must not outlive the hold
                job.cancel()
                with suppress(StillframeError):
                    job.wait()
                raise
            if self._stop.is_set():
                job.cancel()

    def _check_held(self) -> None:
        """Release the VM if the next snapshot cannot be an increment on the last. Raises what the
        store raises."""
        if self._hold is None:
            return
        why = self._hold.interruption()
        if why is None and not may_go_on_from(self._store, self._hold.last):
            why = "the chain is long enough, or its last snapshot is gone from the store"
        if why is not None:
            self._follower.interrupted(why)
            self._let_go()

    def _connected(self) -> Machine | None:
        """Wait for the VM and connect to it; None: told to stop."""
        since_s, told = time.monotonic(), False
        while not self._stop.is_set():
            try:
                return self._connect()
            except (UsageError, RefusedError):
                raise
            except StillframeError as error:
                away_s = time.monotonic() - since_s
                most_s = self._most_away_s if self._taken else 0.0
                if most_s is not None and away_s >= most_s:
                    raise
                if not told:
                    told = True
                    self._follower.gone(error)
            self._stop.wait(_GONE_POLL_S)
        return None

    def _let_go(self) -> None:
        """Un-protect RAM and close the connection."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.close()
            with suppress(StillframeError):
                hold.machine.close()
