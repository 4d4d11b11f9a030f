"""No device that QEMU offers makes a take harm its VM, or a snapshot that cannot be restored."""

from __future__ import annotations

import pytest

from guests.qemu import qemu_binary
from tests.soak.device_sweep import sweep
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_uffd_wp

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("which", ["stock", "newer"])
def test_every_device(which: str) -> None:
    has_uffd_wp().require()
    program = qemu_binary() if which == "stock" else require_newer_qemu()
    found = list(sweep(program))
    assert sum(swept.outcome == "restored" for swept in found) > 100
    wrong = [s for s in found if s.outcome not in ("restored", "refused", "not added")]
    assert wrong == []
