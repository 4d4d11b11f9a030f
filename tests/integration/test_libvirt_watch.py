"""``watch`` of a domain of a real libvirtd: increments, and libvirt stays right about it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.consistency import check_pages
from guests.domain import GuestDomain, virsh
from stillframe import api
from stillframe.restore.restored import list_restored
from stillframe.store.store import Store
from tests.integration.test_libvirt_image import goes_on
from tests.integration.test_watch import Steps
from tests.support.probes import has_libvirt, has_linux_guest, has_uffd_wp

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestDomain]:
    has_libvirt().require()
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestDomain(mem_mib=48) as guest:
        yield guest


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Where libvirt's QEMU may read disks; domains that were restored end with the test."""
    place = Path(tempfile.mkdtemp(prefix="sf-libvirt-watch-", dir="/var/tmp"))
    place.chmod(0o711)
    monkeypatch.setenv("STILLFRAME_STORE", str(place / "store"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    yield api.init()
    for vm in list_restored():
        vm.kill()
    shutil.rmtree(place)


def test_each_snapshot_but_the_first_is_what_was_written_since(
    guest: GuestDomain, store: Store
) -> None:
    states: list[str] = []
    steps = Steps(*[lambda: states.append(virsh("domstate", guest.name).strip())] * 3)
    assert api.watch(guest.name, every_s=0.5, count=3, follower=steps, disks="none") == 3
    assert steps.errors == []
    assert steps.tracked == [False, True, True]
    assert states == ["running"] * 3
    assert "None" in virsh("domjobinfo", guest.name)
    sizes = []
    for taken, _ in steps.snapshots:
        with store.open(store.find(taken.id)) as snapshot:
            sizes.append(snapshot.file_bytes)
            pages = (page for _, page in snapshot.iter_pages("pc.ram") if page is not None)
            report = check_pages(pages)
        assert report.consistent, str(report)
    assert max(sizes[1:]) < sizes[0]
    assert guest.is_progressing()

    domain = api.restore_domain(f"{guest.name}@latest", wait=True)
    assert goes_on(domain)
    assert guest.is_progressing()


def test_it_is_free_again_afterwards(guest: GuestDomain, store: Store, tmp_path: Path) -> None:
    api.watch(guest.name, every_s=0.2, count=2, follower=Steps(), disks="none")
    virsh("suspend", guest.name)
    virsh("resume", guest.name)
    api.take(guest.name, tmp_path / "x.still", disks="none").wait(120)
    assert guest.is_progressing()
