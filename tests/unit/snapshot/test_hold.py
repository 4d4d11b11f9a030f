"""What is kept from one snapshot to the next, where something outside fails between them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.errors import NotFoundError, RefusedError
from stillframe.machine import Blocker
from stillframe.model import Statistics
from stillframe.snapshot import into_store
from stillframe.snapshot.guard import Guard
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.into_store import take_into_store
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import NoOutput
from stillframe.snapshot.take import take_held
from stillframe.snapshot.taken import TakenSnapshot
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.stores import store_on


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Of a machine that has a monitor, and nobody who answers there."""
    ours, theirs = socket.socketpair()
    machine: Any = SimpleNamespace(
        monitor_fd=ours.fileno, process_alive=lambda: True, status=lambda: "running"
    )
    with ours, theirs, closing(Hold(machine, stay=True)) as hold:
        yield hold


def armed(hold: Hold) -> list[bool]:
    """RAM is armed; what is returned gets an entry when it is released."""
    released: list[bool] = []
    ram: Any = SimpleNamespace(release=lambda: released.append(True))
    hold._ram = ram
    return released


def test_a_guard_that_was_killed_is_replaced(hold: Hold) -> None:
    first = hold.guard()
    assert isinstance(first, Guard)
    assert hold.guard() is first
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    second = hold.guard()
    assert isinstance(second, Guard)
    assert second.pid != first.pid
    second.arm()
    second.disarm()
    assert second.alive
    hold.close()
    assert not second.alive


def test_what_the_store_did_not_enter_is_nothing_to_go_on_from(
    hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = armed(hold)

    def taken_held(_control: JobControl, held: Hold, *_: object) -> TakenSnapshot:
        taken = TakenSnapshot(id="1" * 64, file="x", statistics=Statistics())
        held.complete(taken)
        return taken

    monkeypatch.setattr(into_store, "take_held", taken_held)
    store = store_on(MemoryObjects())
    with pytest.raises(NotFoundError):  # there is no data
        take_into_store(JobControl(), hold.machine, store, SnapshotOptions(), hold=hold, since=None)
    assert hold.last is None
    assert released == [True]


def test_after_a_refusal_nothing_is_taken_on_trust(hold: Hold) -> None:
    """What merges pages, or writes to them past the protection, was there before it was found."""
    released = armed(hold)
    machine: Any = hold.machine
    machine.pid, machine.lock_name = os.getpid(), f"test-hold-{os.getpid()}"
    found = Blocker(name="ksm", reason="merged", remedy="do not", severity="refuse")
    machine.preflight = lambda _mode: [found]
    hold.complete(TakenSnapshot(id="1" * 64, file="x", statistics=Statistics()))
    assert hold.last is not None
    with pytest.raises(RefusedError, match="merged"):
        take_held(JobControl(), hold, NoOutput(), SnapshotOptions())
    assert hold.last is None
    assert released == [True]
