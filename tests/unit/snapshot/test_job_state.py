"""Changes of state: atomic, told in order, and not to be cancelled past the point of no return."""

from __future__ import annotations

import pytest

from stillframe.snapshot.job_state import StateMachine


def test_changes_are_told_in_order_and_once() -> None:
    told: list[str] = []
    states = StateMachine(told.append)
    for state in ("setup", "setup", "active", "active"):
        assert states.enter(state)  # type: ignore[arg-type]
    assert states.under_way
    assert states.end(failed=False) == "completed"
    assert not states.under_way
    assert not states.enter("active")
    assert states.end(failed=True) == "completed"
    assert told == ["setup", "active", "completed"]


def test_too_late_to_cancel() -> None:
    states = StateMachine()
    states.enter("active")
    assert states.commit()
    assert not states.cancel()
    assert states.enter("postcopy-active")
    assert states.end(failed=True) == "failed"


def test_too_late_to_go_on() -> None:
    states = StateMachine()
    states.enter("active")
    assert states.cancel()
    assert states.cancel()
    assert not states.commit()
    assert not states.enter("device")
    assert states.end(failed=True) == "cancelled"
    assert states.cancel()


def test_a_guest_that_runs_elsewhere_cannot_be_called_back() -> None:
    states = StateMachine()
    states.enter("postcopy-active")
    assert not states.cancel()


@pytest.mark.parametrize("failed", [True, False])
def test_the_end(failed: bool) -> None:
    told: list[str] = []
    states = StateMachine(told.append)
    states.enter("active")
    assert states.end(failed=failed) == ("failed" if failed else "completed")
    assert told[-1] == states.value
