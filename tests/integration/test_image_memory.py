"""Restores of every kind of memory: on an image, or by the stream and the reason by name.

Private memory, memfds and NUMA nodes are in ``test_image.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import RAM_ID, GuestVm
from stillframe import api
from stillframe.image import filler
from stillframe.image.filling import Filling
from stillframe.restore.restored import list_restored
from tests.support.image_vm import image_vms, ram_differences
from tests.support.probes import has_huge_pages, has_linux_guest, has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs

pytestmark = pytest.mark.qemu

RAM_MIB = 128
FILL_S = 60.0


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    has_linux_guest().require()
    has_uffd_wp().require()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    yield
    for vm in list_restored():
        if vm.directory.startswith(str(tmp_path)):  # not another test run's domains
            vm.kill()


def taken(memory: str, file: Path) -> Path:
    guest = GuestVm("linux", ram_mib=RAM_MIB, populate_mib=16, memory=memory)  # type: ignore[arg-type]
    with guest.start() as vm:
        mode = "stop" if memory == "file" else "background"  # on a disk: nothing protects it
        api.take(str(vm.qmp_path), file, mode=mode).wait(FILL_S)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("memory", ["file", "shm"])
def test_memory_in_a_file(tmp_path: Path, memory: str) -> None:
    file = taken(memory, tmp_path / "x.still")
    vm = api.restore(file, paused=True)
    assert vm.image_path is not None, vm.notes
    assert vm.wait_resident(FILL_S)
    assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []


def test_huge_pages_are_streamed_and_named(tmp_path: Path) -> None:
    has_huge_pages(2 * RAM_MIB).require()
    file = taken("hugetlb", tmp_path / "x.still")
    vm = api.restore(file, paused=True)
    assert vm.image_path is None
    why = f"RAM block {RAM_ID!r} is on huge pages"
    assert any(note.endswith(why) for note in vm.notes), vm.notes
    assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []


@pytest.mark.parametrize("huge", ["always", "advise"])
def test_no_transparent_huge_page_over_a_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge: str
) -> None:
    """In shared memory that would have them, a partly filled image is filled on, and is right."""
    place = tmp_path / "shm"

    def make_file(number: int) -> int:
        return os.open(place / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    with mounted_tmpfs(place, f"huge={huge}"):
        file = taken("private", tmp_path / "x.still")
        with image_vms(file, tmp_path / "vms") as vms:
            with monkeypatch.context() as patch:
                patch.setattr(filler, "_MOST_WORKERS", 0)  # only what is touched
                filling = vms.start(paused=True, working_set=False, make_file=make_file)
                assert vms.differences(blocks=["pc.ram"]) == []
                assert filling.progress().faults > 0
                filling.close()
            assert Filling.adopt(vms.record_path).wait(FILL_S)
            assert vms.differences() == []
