"""Domains of libvirt that are asked over a monitor beside libvirt's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.consistency import check_pages
from guests.domain import GuestDomain
from stillframe import api
from stillframe.machine.libvirt import domain as domain_module
from stillframe.qmp.client import QmpClient
from stillframe.store import open_snapshot
from tests.support.journal_domain import monitor
from tests.support.newer_qemu import qemu_version, require_newer_qemu
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp
from tests.support.taking import finish, start_take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def domain() -> Iterator[GuestDomain]:
    for need in (has_libvirt(), has_linux_guest(), has_uffd_wp()):
        need.require()
    with GuestDomain(mem_mib=48, own_monitor=True) as guest:
        yield guest


def _consistent(file: Path) -> bool:
    with open_snapshot(file) as snapshot:
        pages = (page for _, page in snapshot.iter_pages("pc.ram") if page is not None)
        return check_pages(pages).consistent


def test_its_own_socket_is_used(
    domain: GuestDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command goes through libvirt, so it does not mark the domain; stop and resume do."""
    # Without its own socket such a libvirt is refused: it passes no descriptors.
    monkeypatch.setattr(domain_module, "_OLDEST", 99_000_000)
    api.take(domain.name, tmp_path / "x.still").wait(120)
    assert _consistent(tmp_path / "x.still")
    assert domain.state() == "running"
    assert "unpaused" in domain.virsh("domstate", "--reason", domain.name)
    assert "custom monitor" not in domain.virsh("dominfo", domain.name)
    assert domain.is_progressing()


def test_one_that_somebody_holds_is_no_hindrance(domain: GuestDomain, tmp_path: Path) -> None:
    with QmpClient.connect(str(domain.own_monitor)):
        api.take(domain.name, tmp_path / "x.still").wait(120)
    assert _consistent(tmp_path / "x.still")
    assert domain.state() == "running"


@pytest.mark.soak
def test_one_is_made_at_run_time_and_goes_with_us(tmp_path: Path) -> None:
    """From QEMU 11.1 on, which no distribution's stable release has: STILLFRAME_NEWER_QEMU names it
    (``pytest -m soak tests/integration/test_libvirt_monitors.py``)."""
    program = require_newer_qemu()
    assert qemu_version(program) >= (11, 1), "STILLFRAME_NEWER_QEMU is older than 11.1"
    for need in (has_libvirt(), has_linux_guest(), has_uffd_wp()):
        need.require()
    with GuestDomain(mem_mib=48, emulator=program) as guest:

        def monitors() -> list[str]:
            labels = (chardev["label"] for chardev in monitor(guest, "query-chardev"))
            return [label for label in labels if label.startswith("stillframe-")]

        with api.connect(guest.name) as machine:
            assert len(monitors()) == 1
            assert machine.status() == "running"
        wait_until(lambda: monitors() == [])
        api.take(guest.name, tmp_path / "x.still").wait(120)
        assert _consistent(tmp_path / "x.still")
        assert guest.state() == "running"
        with open_snapshot(tmp_path / "x.still") as snapshot:
            told = str(snapshot.manifest.machine.command_line)
            assert "monitor-qmp" not in told
        wait_until(lambda: monitors() == [])


@pytest.mark.parametrize("point", ["stopped", "protected"])
def test_killed_over_its_own_socket(domain: GuestDomain, tmp_path: Path, point: str) -> None:
    process = start_take(domain, tmp_path / "x.still", fault=f"{point}=kill")
    finish(process)
    assert domain.is_progressing()
    assert domain.state() == "running"
    api.take(domain.name, tmp_path / "next.still").wait(120)
    assert _consistent(tmp_path / "next.still")
