"""The long counts: hundreds of snapshots, a hundred kills (``make soak``).

Figures of full runs are in docs/reference/measurements.md. ``STILLFRAME_SOAK_COUNT`` sets the
count per configuration.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm
from tests.support.killing import kill_at_random_moments
from tests.support.probes import has_uffd_wp
from tests.support.taking import assert_unharmed, consistency, take

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(5400)]

GuestFactory = Callable[..., GuestVm]
SNAPSHOTS = int(os.environ.get("STILLFRAME_SOAK_COUNT", "50"))
KILLS = int(os.environ.get("STILLFRAME_SOAK_COUNT", "50"))


@pytest.fixture(autouse=True)
def _kernel() -> None:
    has_uffd_wp().require()


@pytest.mark.parametrize("memory", ["private", "memfd"])
@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_never_torn(
    linux_guest: GuestFactory,
    multiboot_guest: GuestFactory,
    tmp_path: Path,
    memory: str,
    accelerator: str,
) -> None:
    options: dict[str, Any] = {"memory": memory, "rate_mib_per_s": 0}
    if accelerator == "kvm":
        vm = multiboot_guest(accelerator="kvm", ram_mib=96, mem_mib=48, clock_pages=16, **options)
    else:
        vm = linux_guest(ram_mib=256, mem_mib=128, **options)
    chance = random.Random(20261123)
    torn = []
    for number in range(SNAPSHOTS):
        time.sleep(chance.uniform(0, 0.3))
        file = tmp_path / f"{number}.still"
        take(vm, file)
        report = consistency(vm, file)
        if not report.consistent:
            torn.append((number, str(report)))
        file.unlink()
    print(f"{accelerator} {memory}: {SNAPSHOTS} snapshots, {len(torn)} torn")
    assert not torn
    assert vm.command("audit").startswith("audit ok")


@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_kill_9(linux_guest: GuestFactory, tmp_path: Path, memory: str) -> None:
    vm = linux_guest(ram_mib=192, mem_mib=64, rate_mib_per_s=0, tick_ms=50, memory=memory)
    outcomes = kill_at_random_moments(
        vm,
        tmp_path,
        lambda: assert_unharmed(vm, tmp_path),
        times=KILLS,
        seed=20261123,
        check_every=5,
    )
    print(f"{memory}: {dict(outcomes)}")
    assert vm.command("audit").startswith("audit ok")
