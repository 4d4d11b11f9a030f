"""How a watch waits for its snapshot; the rest is tested on real VMs (test_watch.py)."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from stillframe.errors import SnapshotCancelled
from stillframe.snapshot import watching


class InterruptedJob:
    """A job whose caller is interrupted while it waits, and that ends as it is told to."""

    def __init__(self) -> None:
        self.cancelled = False

    def wait(self, _timeout_s: float | None = None) -> None:
        if not self.cancelled:
            raise KeyboardInterrupt
        raise SnapshotCancelled("cancelled")

    def cancel(self) -> None:
        self.cancelled = True


def test_an_interrupt_cancels_the_snapshot_and_stays_one() -> None:
    watch: Any = object.__new__(watching.Watching)
    watch._stop = threading.Event()
    job = InterruptedJob()
    with pytest.raises(KeyboardInterrupt):
        watch._finish(job)
    assert job.cancelled
