"""What a human monitor tells of a migration, as QEMU prints it."""

from __future__ import annotations

import pytest

from stillframe.snapshot.by_migration import _DOWNTIME, _STATUS, _WHY

QEMU_7 = """\
globals:
store-global-state: on
Migration status: completed
total time: 69 ms
downtime: 2 ms
setup: 0 ms
"""
QEMU_11 = """\
Status: \t\tcompleted
Time (ms): \t\ttotal=69, setup=0, down=2
RAM info:
  Others: \t\tdirty_syncs=1, downtime_bytes=8305
"""
FAILED_7 = "Migration status: failed\ntotal time: 0 ms\nError: Unable to write to file\n"
FAILED_11 = "Status: \t\tfailed (ram_save_setup failed: Input/output error)\n"


@pytest.mark.parametrize("told", [QEMU_7, QEMU_11])
def test_the_downtime(told: str) -> None:
    found = _DOWNTIME.search(told)
    assert found is not None
    assert [int(number) for number in found.groups() if number] == [2]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (FAILED_7, "Unable to write to file"),
        (FAILED_11, "ram_save_setup failed: Input/output error"),
    ],
)
def test_why_it_failed(told: str, why: str) -> None:
    status, found = _STATUS.search(told), _WHY.search(told)
    assert status is not None
    assert found is not None
    assert {one for one in status.groups() if one} == {"failed"}
    assert [one for one in found.groups() if one] == [why]
