"""The SIGSEGV handler among other handlers, signals, threads and processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
SEGV = -11


def run(scenario: str, argument: str = "") -> tuple[int, str, str]:
    """Exit status (negative: the signal), whether it survived, and what it complained of."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.own_faults_child", scenario, argument],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


def survives(scenario: str, argument: str = "") -> None:
    status, output, complaint = run(scenario, argument)
    assert (status, output) == (0, "survived"), complaint


@pytest.mark.parametrize("kind", ["null", "read-only", "execute", "no-access", "sent"])
def test_faults_that_are_not_ours_kill_as_ever(kind: str) -> None:
    assert run("fault", kind) == (SEGV, "", "")


@pytest.mark.parametrize("kind", ["null", "read-only"])
def test_and_after_the_capture_too(kind: str) -> None:
    assert run("fault_after", kind) == (SEGV, "", "")


@pytest.mark.parametrize("kind", ["info", "plain", "escape"])
def test_a_handler_that_was_there_before_gets_its_faults(kind: str) -> None:
    survives("chained", kind)


@pytest.mark.parametrize("kind", ["info", "plain", "escape"])
def test_a_handler_that_came_later_gets_its_faults_too(kind: str) -> None:
    survives("installed_over", kind)


def test_a_handler_that_passes_faults_back_to_us_ends_nowhere_else() -> None:
    assert run("installed_over_and_passes_back")[:2] == (SEGV, "")


@pytest.mark.parametrize("order", ["before", "after", "twice"])
def test_pythons_faulthandler_reports_and_the_process_dies(order: str) -> None:
    status, output, report = run("python_faulthandler", order)
    assert (status, output) == (SEGV, "")
    assert report.count("Fatal Python error: Segmentation fault") == 1


def test_pythons_faulthandler_may_be_disabled_between_captures() -> None:
    survives("faulthandler_taken_away")


def test_the_handler_keeps_errno() -> None:
    survives("errno_kept")


@pytest.mark.parametrize("how", ["prepared", "blocking prepared"])
def test_a_prepared_thread_has_a_stack_for_faults_and_lets_them_in(how: str) -> None:
    survives("special_thread", how)


@pytest.mark.parametrize("how", ["", "blocking"])
def test_else_the_kernel_kills(how: str) -> None:
    """The control of the test above; and the documented limits."""
    assert run("special_thread", how)[:2] == (SEGV, "")


def test_a_thread_that_holds_the_gil_is_served() -> None:
    survives("holding_the_gil")


def test_a_forked_child_is_on_its_own() -> None:
    survives("forked_child")


def test_more_mappings_than_the_kernel_allows_fail_the_capture_only() -> None:
    survives("too_many_mappings")


def test_threads_that_fault_while_their_range_is_given_up_go_on() -> None:
    """A fault on its way to the handler, of a range that is no more, is nobody's error."""
    survives("given_up_at_once")
