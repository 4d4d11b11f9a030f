"""Every named fault point: an exception there, and `kill -9` there; the guest survives both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe.snapshot.faultpoints import POINTS
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.taking import assert_unharmed, finish, start_take

pytestmark = [pytest.mark.qemu]

GuestFactory = Callable[..., GuestVm]


@pytest.fixture(scope="module")
def vm() -> Iterator[GuestVm]:
    has_uffd_wp().require()
    has_linux_guest().require()
    with GuestVm(ram_mib=192, mem_mib=48, rate_mib_per_s=0, tick_ms=50).start() as guest:
        yield guest


@pytest.mark.parametrize("point", POINTS)
def test_an_exception(vm: GuestVm, tmp_path: Path, point: str) -> None:
    code, reply, complaints = finish(start_take(vm, tmp_path / "a.still", fault=point))
    assert code == 70
    assert reply["guest_state"] == "running"
    assert point in reply["what"]
    assert "Traceback" not in complaints
    assert_unharmed(vm, tmp_path)


@pytest.mark.parametrize("point", POINTS)
def test_kill(vm: GuestVm, tmp_path: Path, point: str) -> None:
    code, _, _ = finish(start_take(vm, tmp_path / "a.still", fault=f"{point}=kill"))
    assert code == -9
    assert_unharmed(vm, tmp_path)


def test_every_point_is_reached(vm: GuestVm, tmp_path: Path) -> None:
    """A point that is never reached would make its tests above pass for nothing."""
    code, reply, _ = finish(start_take(vm, tmp_path / "a.still"))
    assert code == 0, reply
    (tmp_path / "a.still").unlink()
    assert_unharmed(vm, tmp_path)
