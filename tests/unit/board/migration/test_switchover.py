"""When the guest is stopped for the end of precopy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from stillframe.board.migration.live import SPAN_S, LiveTransfer
from stillframe.board.migration.parameters import Parameters
from stillframe.board.migration.precopy import Switchover
from stillframe.snapshot.rate import RateMeter

MIB = 1 << 20


class Ram:
    """So much is known to be dirty, and the guest has written so much more."""

    def __init__(self, remaining_bytes: int) -> None:
        self.remaining_bytes = remaining_bytes
        self.written_bytes = 0

    def sync(self) -> None:
        self.remaining_bytes += self.written_bytes
        self.written_bytes = 0


class Transfer:
    """Of 100 MiB, over a channel of 200 MiB/s, half of which is counted on."""

    def __init__(self, *, measured: bool = True, **parameters: int) -> None:
        self.ram = Ram(100 * MIB)
        self.meter = RateMeter(SPAN_S)
        if measured:
            self.meter.add(0.1, 20 * MIB, 0.1)
        self.task = SimpleNamespace(parameters=SimpleNamespace(now=Parameters(**parameters)))
        self.drained = 0
        self.switchover = Switchover(cast(LiveTransfer, self))

    def drain(self) -> None:
        self.drained += 1

    def sent(self) -> None:
        """All pages were sent once."""
        self.ram.remaining_bytes = 0
        assert self.switchover.is_near()


def test_not_before_all_pages_were_sent_once() -> None:
    transfer = Transfer(downtime_limit=10_000)
    assert not transfer.switchover.is_near()
    transfer.ram.remaining_bytes = 4096
    assert not transfer.switchover.is_near()
    transfer.sent()


def test_what_is_left_fits_into_the_downtime_limit() -> None:
    transfer = Transfer(downtime_limit=300)
    transfer.sent()
    transfer.ram.written_bytes = 31 * MIB
    assert not transfer.switchover.is_due()
    assert not transfer.switchover.is_near()
    transfer.ram.remaining_bytes = 29 * MIB
    assert transfer.switchover.is_near()
    assert transfer.switchover.is_due()


def test_nothing_is_on_its_way_when_the_guest_is_stopped() -> None:
    transfer = Transfer()
    transfer.sent()
    assert transfer.switchover.is_due()
    assert transfer.drained == 1


def test_before_a_speed_is_known_only_nothing_is_little() -> None:
    transfer = Transfer(measured=False)
    transfer.sent()
    transfer.ram.written_bytes = 4096
    assert not transfer.switchover.is_due()
    transfer.ram.remaining_bytes = 0
    assert transfer.switchover.is_due()


def test_a_speed_that_somebody_has_set_is_believed() -> None:
    transfer = Transfer(measured=False, avail_switchover_bandwidth=100 * MIB)
    transfer.sent()
    transfer.ram.written_bytes = 29 * MIB
    assert transfer.switchover.is_due()
