"""Compaction of real VMs' chains: clones that run from one are not disturbed; RAM is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import NotFoundError
from stillframe.image.filling import Filling
from stillframe.restore.restored import list_restored
from stillframe.store import compaction
from stillframe.store.records import Entry
from stillframe.store.store import Store
from tests.support.image_killing import kill_filler
from tests.support.image_vm import image_vms, ram_differences
from tests.support.probes import has_multiboot_guest, has_uffd_wp
from tests.support_store.chains import Ram, ram_of

pytestmark = pytest.mark.qemu
FILL_S = 60.0


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestVm]:
    has_multiboot_guest().require()
    has_uffd_wp().require()
    with GuestVm(
        "multiboot", ram_mib=64, mem_mib=8, populate_mib=16, rate_mib_per_s=20, name="compacted"
    ).start() as vm:
        yield vm


@pytest.fixture
def store(guest: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """With a chain of three; VMs that were restored end with the test."""
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(compaction, "MOST_FILES", 2)
    tmp_path.chmod(0o700)
    made = api.init()
    for _ in range(3):
        api.take(str(guest.qmp_path)).wait(120)
    yield made
    for vm in list_restored():
        vm.kill()


def ram(store: Store, entry: Entry) -> Ram:
    with store.open(entry) as snapshot:
        return ram_of(snapshot)


def compact_and_prune(store: Store) -> None:
    """Of the three files that the last needed, none is left but its own, which is not enough."""
    done = api.prune(keep_last=1)
    assert len(done.compaction.compacted) == 1
    assert len(done.removed) == 2
    assert len(store.list()) == 1


def test_ram_is_the_same_byte_by_byte(store: Store) -> None:
    last = store.list()[-1]
    before = ram(store, last)
    compact_and_prune(store)
    assert ram(store, last) == before
    vm = api.restore(last.short_id, paused=True)
    assert vm.snapshot_id == last.id
    assert vm.wait_resident(FILL_S)
    assert ram_differences(vm.pid, Path(vm.qmp_address), Path(store.location(last))) == []
    assert api.check(read_data=1.0).findings == ()


def test_a_clone_that_is_being_filled_gets_all_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files that were there when it began, though they have no names any more."""
    file = Path(store.location(store.list()[-1]))
    monkeypatch.setattr(Filling, "sweep", lambda _self: None)  # nothing but what is asked for
    with image_vms(file, tmp_path / "clones") as clones:
        filling = clones.start(1, paused=True, working_set=False)
        compact_and_prune(store)
        assert clones.differences() == []
        filling.close()


def test_who_takes_the_filling_over_finds_the_whole_form(store: Store, tmp_path: Path) -> None:
    file = Path(store.location(store.list()[-1]))
    with image_vms(file, tmp_path / "clones") as clones:
        filling = clones.start(1, paused=True, working_set=False)
        kill_filler(filling.hand_over(log_path=tmp_path / "filler.log"))
        compact_and_prune(store)
        with contextlib.suppress(NotFoundError):  # it was through
            assert Filling.adopt(clones.record_path).wait(FILL_S)
        assert clones.differences() == []


def test_the_next_snapshot_goes_on_from_it(guest: GuestVm, store: Store) -> None:
    """Of the VM, and of a clone, which knows by itself what it changed."""
    compact_and_prune(store)
    (last,) = store.list()
    following = store.find(api.take(str(guest.qmp_path)).wait(120).id)
    assert following.parent == last.id
    (clone,) = api.fork(last.short_id, trust=True, wait=True)
    of_clone = store.find(api.take(clone.pid).wait(120).id)
    assert of_clone.parent == last.id
    for entry in (following, of_clone):
        with store.open(entry) as snapshot:
            assert len(snapshot.files) == 2
            snapshot.verify()
    assert api.check(read_data=1.0).lost == {}
