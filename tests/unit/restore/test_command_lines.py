"""Command lines as tools write them: each is planned, and from elsewhere all of it is named.

In ``tests/data/command_lines``: ``NAME.args``, and ``NAME.trust`` with what a file from elsewhere
asks trust for. To write the latter anew: ``STILLFRAME_WRITE_EXPECTED=1``, and read the difference.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from stillframe.restore.records import RestorePlan
from tests.unit.restore.recorded import Planner, machine

DATA = Path(__file__).parents[2] / "data/command_lines"
LINES = sorted(DATA.glob("*.args"))


def plan_of(planner: Planner, file: Path, *, here: bool) -> RestorePlan:
    record = machine(shlex.split(file.read_text()), cwd=str(planner.directory))
    return planner.plan_record(record, here=here)


@pytest.mark.parametrize("file", LINES, ids=lambda file: file.stem)
def test_it_is_planned_on_its_own_host(planner: Planner, file: Path) -> None:
    plan = plan_of(planner, file, here=True)
    assert not plan.refusals
    assert not plan.needs_trust


@pytest.mark.parametrize("file", LINES, ids=lambda file: file.stem)
def test_from_elsewhere_it_names_what_needs_trust(planner: Planner, file: Path) -> None:
    plan = plan_of(planner, file, here=False)
    found = [f"{risk.option.split(' ')[0]}: {risk.reason}" for risk in plan.risks]
    found = [line.replace(str(planner.directory), "/home/u") for line in found]
    expected = file.with_suffix(".trust")
    if os.environ.get("STILLFRAME_WRITE_EXPECTED"):
        expected.write_text("".join(f"{line}\n" for line in found))
    assert found == expected.read_text().splitlines()
