"""`kill -9` of the snapshotter at random moments; the long count is in tests/soak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from tests.support.killing import kill_at_random_moments
from tests.support.probes import has_uffd_wp
from tests.support.taking import assert_unharmed

pytestmark = [pytest.mark.qemu]


@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_the_guest_goes_on(
    linux_guest: Callable[..., GuestVm], tmp_path: Path, memory: str
) -> None:
    has_uffd_wp().require()
    vm = linux_guest(ram_mib=192, mem_mib=64, rate_mib_per_s=0, tick_ms=50, memory=memory)
    outcomes = kill_at_random_moments(
        vm, tmp_path, lambda: assert_unharmed(vm, tmp_path), times=8, seed=1, check_every=2
    )
    assert outcomes["killed"] >= 4
    assert vm.command("audit").startswith("audit ok")
