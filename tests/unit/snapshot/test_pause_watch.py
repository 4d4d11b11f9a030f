"""Whether what others did to a guest in the downtime is noticed."""

from __future__ import annotations

import pytest

from stillframe.errors import SnapshotFailed
from stillframe.machine import MachineEvent
from stillframe.snapshot.pause_watch import PauseWatch


class ToldEvents:
    """A watch whose events the test tells."""

    def __init__(self) -> None:
        self.events: list[MachineEvent] = []

    def tell(self, *names: str) -> None:
        self.events += [MachineEvent(name=name, data={}, received_s=0.0) for name in names]

    def seen(self) -> list[MachineEvent]:
        return list(self.events)

    def close(self) -> None:
        """Nothing to end."""


def test_what_came_before_it_began_does_not_count() -> None:
    watch = ToldEvents()
    watch.tell("RESET", "STOP", "RESUME")
    pause_watch = PauseWatch(watch)
    watch.tell("STOP")
    pause_watch.check(also=("RESET",))
    assert not pause_watch.broken()


@pytest.mark.parametrize("event", ["RESUME", "WAKEUP", "RESET"])
def test_what_breaks_it(event: str) -> None:
    watch = ToldEvents()
    pause_watch = PauseWatch(watch)
    watch.tell("STOP", event)
    with pytest.raises(SnapshotFailed, match=event):
        pause_watch.check(also=("RESET",))
    assert pause_watch.broken() == (event != "RESET")


def test_a_reset_that_is_told_only_with_the_answer_to_cont() -> None:
    watch = ToldEvents()
    pause_watch = PauseWatch(watch)
    watch.tell("STOP", "RESUME", "RESET")
    pause_watch.check_until_resumed(also=("RESET",))
    watch.events[:] = []
    watch.tell("STOP", "RESET", "RESUME")
    with pytest.raises(SnapshotFailed, match="RESET"):
        pause_watch.check_until_resumed(also=("RESET",))
