"""Volatility 3 reads the plain stream: it finds the guest kernel's banner in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from tests.support.probes import has_uffd_wp
from tests.support.taking import command, take

VOLATILITY = Path(sys.executable).with_name("vol")
pytestmark = pytest.mark.qemu


def test_the_linux_banner_is_found(linux_guest: Callable[..., GuestVm], tmp_path: Path) -> None:
    has_uffd_wp().require()
    if not VOLATILITY.exists():
        pytest.skip("missing volatility: no package volatility3 beside this Python")
    # Volatility takes the file for a QEMU stream only if the main block is called pc.ram.
    vm = linux_guest(memory="private", ram_mib=192, mem_mib=16)
    file, stream = tmp_path / "a.still", tmp_path / "a.qemu"
    take(vm, file)
    subprocess.run(
        command("export", str(file), "--format", "qemu", "-o", str(stream)),
        check=True,
        timeout=60,
        capture_output=True,
    )
    found = subprocess.run(
        [VOLATILITY, "-q", "-f", str(stream), "banners.Banners"],
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "Linux version" in found.stdout
