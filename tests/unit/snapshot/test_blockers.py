"""What happened while RAM was saved: one note for each kind of event."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stillframe.snapshot.blockers import check_saved
from stillframe.snapshot.options import SnapshotOptions


def test_one_note_for_each_kind_of_event() -> None:
    names = ["STOP", "RESUME", "RTC_CHANGE", "NIC_RX_FILTER_CHANGED", *["RTC_CHANGE"] * 3]
    machine = SimpleNamespace(blocks_signature=lambda: (), preflight=lambda *_: [])
    hold: Any = SimpleNamespace(machine=machine, signature=(), blocks=())
    watch: Any = SimpleNamespace(seen=lambda: [SimpleNamespace(name=name) for name in names])
    assert check_saved(hold, SnapshotOptions(), watch) == [
        "RTC_CHANGE came while RAM was saved (4 times)",
        "NIC_RX_FILTER_CHANGED came while RAM was saved",
    ]
