"""Who fills an image, who restores, and clones are killed, hundreds of times (``make soak``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from tests.support.image_killing import kill_clones, kill_fillers, kill_restorers
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.taking import take

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(5400)]
KILLS = int(os.environ.get("STILLFRAME_SOAK_COUNT", "200"))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    has_linux_guest().require()
    has_uffd_wp().require()
    file = tmp_path_factory.mktemp("snapshot") / "x.still"
    with GuestVm("linux", ram_mib=160, populate_mib=48, memory="private").start() as vm:
        take(vm, file)
    return file


def test_fillers(snapshot: Path, tmp_path: Path) -> None:
    done = kill_fillers(snapshot, kills=KILLS, seed=20261128, directory=tmp_path)
    print(f"{sum(done)} fillers killed before {len(done)} images were complete; no page wrong")


def test_restorers(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    killed, vms = kill_restorers(snapshot, kills=KILLS, seed=20261129, runtime=tmp_path)
    print(f"{killed} restores killed, {vms} VMs had come to be; no page wrong, nothing left")


def test_clones(snapshot: Path, tmp_path: Path) -> None:
    kill_clones(snapshot, kills=KILLS, seed=20261130, directory=tmp_path)
    print(f"{KILLS} clones killed; no page of the other ones wrong")
