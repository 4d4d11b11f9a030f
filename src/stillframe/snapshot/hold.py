"""The hold on a machine: everything that a snapshot of it needs throughout. A watch keeps its hold
from one snapshot to the next, so that each but the first contains only what was written since.

An interruption of the tracking voids the hold: the next snapshot takes a new one, and reads RAM to
find out what changed.
"""

from __future__ import annotations

from contextlib import ExitStack

from stillframe.capture.ram_capture import RamCapture
from stillframe.capture.swapping import SwapAccess
from stillframe.capture.write_protection import WriteProtection
from stillframe.errors import SnapshotFailed, StillframeError
from stillframe.machine import Machine, Watch
from stillframe.model import GpaRange, RamBlock
from stillframe.snapshot import faultpoints
from stillframe.snapshot.arming import arm_capture, open_capture
from stillframe.snapshot.exclusive import VmLock
from stillframe.snapshot.guard import Guarding, guard_of
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.memory_limit import swap_access
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.ram_blocks import Signature
from stillframe.snapshot.taken import TakenSnapshot

_VOIDING = {
    "RESET": "the VM was reset",
    "DEVICE_DELETED": "a device was unplugged, which may have written to RAM by itself",
}
"""Events (QEMU ``qapi/run-state.json``, ``qdev.json``) after which some writes may have gone
unseen. The pre-flight judges the devices that are still there."""


class Hold:
    """The hold on one machine. Guest state: running; after ``close``, unprotected.

    Args:
        stay: keep RAM armed after a snapshot.

    Attributes:
        blocks, memory_map, signature: the machine's RAM; set by :meth:`list_blocks`.
        last: the snapshot since whose instant every write was tracked, or None.
    """

    blocks: tuple[RamBlock, ...]
    memory_map: tuple[GpaRange, ...]
    signature: Signature

    def __init__(self, machine: Machine, *, stay: bool = False) -> None:
        self.machine = machine
        self.last: TakenSnapshot | None = None
        self._stay = stay
        self._cleanup = ExitStack()
        self._lock: VmLock | None = None
        self._guard: Guarding | None = None
        self._protection: WriteProtection | None = None
        self._ram: RamCapture | None = None
        self._swap: SwapAccess | None = None
        self._watch: Watch | None = None
        self._watch_before: Watch | None = None

    @property
    def stays(self) -> bool:
        """Whether RAM stays armed after a snapshot."""
        return self._stay

    @property
    def own_blockers(self) -> frozenset[str]:
        """Blockers that the pre-flight reports because of our own userfaultfd; while RAM is armed,
        no other process can have one on it."""
        return frozenset() if self._ram is None else frozenset({"userfaultfd"})

    def lock(self) -> None:
        """Lock out other snapshots of the machine until ``close``. Raises BusyError."""
        if self._lock is None:
            self._lock = VmLock(self.machine.lock_name)
            self._cleanup.callback(self._lock.close)
            faultpoints.reach("locked")

    def look_at_swap(self) -> bool:
        """Return whether some RAM is in swap and can be left there; call between ``list_blocks``
        and ``arm``. Raises HostError."""
        if self._swap is None:
            self._swap = swap_access(self.machine.pid, self.blocks)
            if self._swap is not None:
                self._cleanup.callback(self._swap.close)
        return self._swap is not None

    def list_blocks(self) -> None:
        """List the RAM blocks, once; :meth:`interruption` checks that they have not changed."""
        if self._ram is None:
            # The signature first, so that a block plugged in between the two calls shows.
            self.signature = self.machine.blocks_signature()
            self.blocks = tuple(self.machine.ram_blocks())
        self.memory_map = self.machine.memory_map(self.blocks)

    def guard(self) -> Guarding:
        """Return the guard process; start one if there is none or it died. Raises HostError."""
        if self._guard is not None and not self._guard.alive:
            self._end_guard()
        elif self._guard is None:
            self._cleanup.callback(self._end_guard)
        if self._guard is None:
            self._guard = guard_of(self.machine.monitor_fd())
            faultpoints.reach("guarded")
        return self._guard

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()

    def arm(
        self,
        control: JobControl,
        options: SnapshotOptions,
        spill_bytes: int,
        *,
        may_drop: bool = False,
    ) -> RamCapture:
        """Protect RAM while the guest runs: all of it, or what was written since the last snapshot.
        With ``mode`` stop, only prepare to read it.

        Args:
            may_drop: the guest may give RAM back during the snapshot.

        Raises:
            SnapshotCancelled: the job was cancelled.
            RefusedError: RAM that stays armed could change unseen.
            StillframeError: RAM cannot be protected.
        """
        control.enter("setup", "attaching" if self._ram is None else "arming")
        if self._ram is not None:
            control.progress.ram = self._ram
            control.progress.protection = self._protection.kind if self._protection else None
            if self._swap is not None:
                self._ram.leave_in_swap(self._swap)
            control.progress.arm_ms = self._ram.settle()
            return self._ram
        background = options.mode == "background"
        if background:
            self._protection = self.machine.open_write_protection()
        self._ram = open_capture(
            control,
            self._cleanup,
            self._protection,
            self.machine.pid,
            self.blocks,
            spill_bytes=spill_bytes,
        )
        if self._swap is not None:
            self._ram.leave_in_swap(self._swap)
        if options.parent is not None:
            self._ram.copy_only(options.parent.changed_pages)
        if self._stay:
            self._ram.stay_armed()
        elif may_drop:
            self._ram.pin_droppable()
        if background:
            arm_capture(control, self._cleanup, self._ram, arm=options.arm)
        return self._ram

    def watch(self) -> Watch:
        """Start a new watch over the machine, before an instant. The previous watch is kept until
        :meth:`check_tracking`, so that no event falls between the two."""
        if self._watch_before is None:
            self._watch_before = self._watch
        elif self._watch is not None:  # its job failed before the instant
            self._watch.close()
        self._watch = self.machine.watch()
        return self._watch

    def trouble(self) -> str | None:
        """Return why RAM cannot stay armed (the VM exited, ...), or None. Does not use the
        monitor."""
        if self._ram is None:
            return None
        try:
            self._ram.check()
        except StillframeError as error:
            return error.why or str(error)
        return None if self.machine.process_alive() else "the VM exited"

    def interruption(self) -> str | None:
        """Return why the next snapshot cannot be an increment on ``last``, or None if it can."""
        if self.last is None or self._ram is None or self._watch is None:
            return "there is no snapshot to go on from"
        if why := self.trouble():
            return why
        try:
            self.machine.status()  # if the monitor is gone, its events were lost
            if self.machine.blocks_signature() != self.signature:
                return "RAM blocks came or went"
        except StillframeError as error:
            return str(error)
        watches = [watch for watch in (self._watch_before, self._watch) if watch is not None]
        for event in (event for watch in watches for event in watch.seen()):
            if event.name in _VOIDING:
                return _VOIDING[event.name]
        return None

    def begin_instant(self) -> TakenSnapshot | None:
        """Clear ``last`` and return it, as the parent of the snapshot that begins. The instant uses
        up the tracked writes, so until :meth:`complete` no snapshot can be a parent."""
        parent, self.last = self.last, None
        return parent

    def check_tracking(self, parent: TakenSnapshot | None) -> None:
        """Check, once the guest runs again, that tracking missed nothing since ``parent``.

        Raises:
            SnapshotFailed: tracking was interrupted.
        """
        before, self._watch_before = self._watch_before, None
        if before is None:
            return
        happened = {event.name for event in before.seen()} & _VOIDING.keys()
        before.close()
        if parent is not None and happened:
            raise SnapshotFailed(
                "what changed since the last snapshot is not known",
                why=_VOIDING[min(happened)],
                remedy="take a whole one",
                guest_state="running",
            )

    def complete(self, taken: TakenSnapshot) -> None:
        """Record a durable snapshot, on which the next may be an increment."""
        if self._stay:
            self.last = taken

    def forget(self) -> None:
        """Drop the last snapshot as a parent, and stop tracking."""
        self.last = None
        self.give_up()

    def give_up(self) -> None:
        """Let every write pass, unless RAM stays armed for a next snapshot. Called at the end of
        each job, even a failed one."""
        if self.last is None and self._ram is not None:
            self._ram.release()

    def close(self) -> None:
        """Release the machine: every page is writable. Never raises."""
        self.last = None
        for watch in (self._watch, self._watch_before):
            if watch is not None:
                watch.close()
        self._cleanup.close()
