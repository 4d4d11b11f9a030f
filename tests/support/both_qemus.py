"""A fixture that runs a test with the stock QEMU and with a newer one."""

from __future__ import annotations

import pytest

from tests.support.newer_qemu import require_newer_qemu


@pytest.fixture(params=["stock", "newer"])
def both_qemus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``qemu_binary`` name the one or the other."""
    if request.param == "newer":
        monkeypatch.setenv("STILLFRAME_QEMU", require_newer_qemu())
