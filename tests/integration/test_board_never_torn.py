"""A few snapshots of boards at random moments, each checked, restored and audited; cancelled and
killed ones. The long counts are in tests/soak/test_board_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillframe.capture import _capture
from tests.support.killing import kill_at_random_moments
from tests.support.ledger_source import WAYS, LedgerKind, LedgerSource, OutsideSource, start_source
from tests.support.never_torn import assert_sound, cancel_at_random_moments, count_torn
from tests.support.probes import has_uffd_wp

SNAPSHOTS = 2
CANCELS = 4
KILLS = 4

Factory = Callable[[str, LedgerKind], LedgerSource]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Factory]:
    with ExitStack() as stack:
        yield lambda way, kind: start_source(stack, tmp_path, way, kind)


@pytest.mark.parametrize("rate", [0, 20])
@pytest.mark.parametrize("vcpus", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_never_torn(start: Factory, tmp_path: Path, way: str, vcpus: int, rate: int) -> None:
    source = start(way, LedgerKind(vcpus, rate))
    counted = count_torn(source, tmp_path, SNAPSHOTS, seed=vcpus + rate)
    assert not counted.torn, str(counted)
    assert counted.faults > 0
    assert_sound(source)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_copy_before_the_write_the_check_fails(
    start: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The control: pages that are un-protected without a copy are found, by the check from outside
    and by the guest's own audit."""
    monkeypatch.setattr(_capture, "PHASE_ACTIVE", _capture.PHASE_RELEASE)
    source = start(way, LedgerKind())
    why = ""
    for number in range(20):  # on a busy host the sweep may be over before the guest writes
        counted = count_torn(source, tmp_path, 1, seed=number)
        why += " ".join(text for _, text in counted.torn)
        if "TORN" in why and ("AUDIT FAILED" in why or "does not answer" in why):
            break
    else:
        pytest.fail(f"not found: {why}")
    # The guest that was saved is none the worse for it.
    assert_sound(source)


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_at_random_moments(start: Factory, tmp_path: Path, way: str) -> None:
    source = start(way, LedgerKind())
    cancel_at_random_moments(source, tmp_path, CANCELS, seed=1)
    counted = count_torn(source, tmp_path, 1, seed=1)
    assert not counted.torn, str(counted)


def test_the_guest_outlives_who_takes_the_snapshot(tmp_path: Path) -> None:
    has_uffd_wp().require()
    files = tmp_path / "files"
    files.mkdir()
    with ExitStack() as stack:
        source = OutsideSource(stack, tmp_path, LedgerKind())
        outcomes = kill_at_random_moments(
            source, files, lambda: assert_sound(source), times=KILLS, seed=1
        )
        assert outcomes["killed"] >= 1
        counted = count_torn(source, files, 1, seed=1)
        assert not counted.torn, str(counted)
