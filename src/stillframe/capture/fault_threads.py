"""The threads that serve the guest's faults, and prepare memory for copies of what it writes."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from stillframe.capture._capture import Capture


class FaultThreads:
    """The fault thread and the spill thread of a capture; :meth:`start` starts them.

    Attributes:
        stop_fd, asked_fd: eventfds that tell the core to end, and to hand on what was copied.
    """

    def __init__(self) -> None:
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.asked_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            os.close(self.stop_fd)
            raise
        self._core: Capture | None = None
        self._threads: list[threading.Thread] = []

    def start(self, core: Capture) -> None:
        """Start the threads; from now on writes to protected pages are served."""
        self._core = core
        for name, serve in (("faults", self._serve), ("spill", core.spill_loop)):
            thread = threading.Thread(target=serve, name=f"stillframe-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        # Nothing may be armed before the fault thread runs without the GIL (invariant 3).
        while not core.is_serving and self._threads[0].is_alive():
            time.sleep(0.0001)

    def _serve(self) -> None:
        assert self._core is not None
        # Real-time if permitted, else normal priority: a vCPU waits for this thread. It never spins
        # (sf_wait_briefly), and serves a fault in well under a millisecond.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        self._core.fault_loop()  # the core keeps its error: see RamCapture.check

    def hand_on_spilled(self) -> None:
        """Make the fault thread hand on its copies now, before its slab is full."""
        os.eventfd_write(self.asked_fd, 1)

    def stop(self) -> None:
        """End the threads; faults are no longer served."""
        if self._core is None:
            return
        os.eventfd_write(self.stop_fd, 1)
        faults, spill = self._threads
        faults.join()
        self._core.end_spill()
        spill.join()
        self._core = None

    def close(self) -> None:
        """Close the descriptors; the threads must have ended."""
        if self.stop_fd >= 0:
            os.close(self.stop_fd)
            os.close(self.asked_fd)
            self.stop_fd = self.asked_fd = -1
