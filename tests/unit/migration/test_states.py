"""Changes of state: atomic, told in order, and not to be cancelled past the point of no return."""

from __future__ import annotations

import pytest

from stillframe.migration.states import StatusCell


def test_changes_are_told_in_order() -> None:
    told: list[str] = []
    cell = StatusCell(told.append)
    assert cell.change("setup", only_from=("none",))
    assert not cell.change("active", only_from=("none",))
    assert cell.change("active", only_from=("setup",))
    assert cell.under_way
    assert cell.change("completed", only_from=("active",))
    assert not cell.under_way
    assert told == ["setup", "active", "completed"]


def test_too_late_to_cancel() -> None:
    cell = StatusCell(lambda state: None)
    cell.change("active", only_from=("none",))
    assert cell.make_final()
    assert not cell.change("cancelling", only_from=("active",))
    assert cell.change("failed", only_from=("active",))


def test_too_late_to_go_on() -> None:
    cell = StatusCell(lambda state: None)
    cell.change("active", only_from=("none",))
    assert cell.change("cancelling", only_from=("active",))
    assert not cell.make_final()
    assert cell.change("cancelled", only_from=("cancelling",))


@pytest.mark.parametrize("failed", [True, False])
def test_the_end(failed: bool) -> None:
    told: list[str] = []
    cell = StatusCell(told.append)
    cell.change("active", only_from=("none",))
    assert cell.end(failed=failed) == ("failed" if failed else "completed")
    assert told[-1] == cell.value
    assert not cell.under_way


def test_the_end_of_what_was_cancelled() -> None:
    cell = StatusCell(lambda state: None)
    cell.change("active", only_from=("none",))
    cell.change("cancelling", only_from=("active",))
    assert cell.end(failed=True) == cell.value == "cancelled"
