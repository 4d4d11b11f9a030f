"""Fixtures of the restore tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.restore.recorded import Planner


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)
