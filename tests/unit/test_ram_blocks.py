"""Which changes of the RAM blocks matter to a snapshot, and what is said of them."""

from __future__ import annotations

import pytest

from stillframe.errors import SnapshotFailed
from stillframe.snapshot.ram_blocks import Signature, check_instant, check_kept

RAM = ("pc.ram", 0x1000, 64, 64)
ROM = ("0000:00:02.0/rom", 0x9000, 4, 4)
BEFORE: Signature = (RAM, ROM)


def test_nothing_changed() -> None:
    check_instant(BEFORE, BEFORE)
    check_instant(BEFORE, (ROM, RAM))
    assert check_kept(BEFORE, BEFORE) == []


def test_what_appears_matters_up_to_the_instant_only() -> None:
    now = (*BEFORE, ("dimm", 0xA000, 8, 8))
    with pytest.raises(SnapshotFailed, match="before the instant") as caught:
        check_instant(BEFORE, now)
    assert caught.value.why == "dimm appeared"
    assert check_kept(BEFORE, now) == [
        "RAM block dimm appeared after the instant: not in the snapshot"
    ]


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ((RAM,), "0000:00:02.0/rom vanished"),
        ((("pc.ram", 0x1000, 32, 64), ROM), "pc.ram was resized from 64 to 32 bytes"),
        ((RAM, ("0000:00:02.0/rom", 0xB000, 4, 4)), "0000:00:02.0/rom was replaced"),
    ],
)
def test_what_goes_or_changes_fails_by_name(now: Signature, why: str) -> None:
    for check in (check_instant, check_kept):
        with pytest.raises(SnapshotFailed) as caught:
            check(BEFORE, now)
        assert caught.value.why == why
