"""Fixtures of the restore tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.restore import networks, qemu_plan
from tests.unit.restore.recorded import Planner


@pytest.fixture(autouse=True)
def able_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has vhost-net, whatever this one has, and lets us make tap interfaces."""
    monkeypatch.setattr(networks, "_VHOST", Path("/dev/null"))
    monkeypatch.setattr(qemu_plan, "_may_administer_networks", lambda: True)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)
