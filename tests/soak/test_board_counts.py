"""The long counts of the board: a thousand snapshots, cancels and kills (``make soak``).

``STILLFRAME_SOAK_COUNT`` sets the count per configuration: with 84, the twelve of
``test_never_torn`` come to 1,008 snapshots. Figures of full runs are in
docs/reference/measurements.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.killing import kill_at_random_moments
from tests.support.ledger_source import WAYS, LedgerKind, LedgerSource, OutsideSource, start_source
from tests.support.never_torn import assert_sound, cancel_at_random_moments, count_torn
from tests.support.probes import has_uffd_wp

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

COUNT = int(os.environ.get("STILLFRAME_SOAK_COUNT", "50"))
SEED = 20261125

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
    counted = count_torn(source, tmp_path, COUNT, seed=SEED)
    print(f"{way}, {vcpus} vCPUs, {rate or 'no'} limit: {counted}")
    assert not counted.torn
    assert_sound(source)


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_at_random_moments(start: Factory, tmp_path: Path, way: str) -> None:
    source = start(way, LedgerKind())
    ended = cancel_at_random_moments(source, tmp_path, COUNT, seed=SEED)
    print(f"{way}: {COUNT} cancelled, {ended} had ended before")
    counted = count_torn(source, tmp_path, 3, seed=SEED)
    assert not counted.torn, str(counted)
    assert_sound(source)


def test_kill_9(tmp_path: Path) -> None:
    has_uffd_wp().require()
    files = tmp_path / "files"
    files.mkdir()
    with ExitStack() as stack:
        source = OutsideSource(stack, tmp_path, LedgerKind())
        outcomes = kill_at_random_moments(
            source, files, lambda: assert_sound(source), times=COUNT, seed=SEED
        )
        print(f"kill -9: {dict(outcomes)}")
        counted = count_torn(source, files, 3, seed=SEED)
        assert not counted.torn, str(counted)
