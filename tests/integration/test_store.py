"""A store and real QEMUs: take into it, restore from it by name, and kill whoever writes."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import BusyError, NotFoundError, RefusedError
from stillframe.qmp.client import QmpClient
from stillframe.restore import restored as restored_room
from stillframe.restore.restored import list_restored
from stillframe.snapshot.faultpoints import STORE_POINTS
from stillframe.still.frames import compress_frame
from stillframe.still.snapshot import Snapshot
from stillframe.store.records import PENDING, SNAPSHOTS
from stillframe.store.store import Store
from tests.integration.test_fork import assert_goes_on
from tests.support.bare_vm import BareVm
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restoring import SMALL
from tests.support.taking import PATIENT_MS, command, finish
from tests.support_store.stores import put

pytestmark = pytest.mark.qemu
NAME = "web1"


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=192, populate_mib=32, tick_ms=50, name=NAME).start() as vm:
        yield vm


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The default store; VMs that were restored end with the test."""
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(restored_room, "ROOTS_RUN", tmp_path / "stillframe")  # not others' VMs
    tmp_path.chmod(0o700)
    yield api.init()
    for vm in list_restored():
        vm.kill()


def start_take(vm: GuestVm, *arguments: str, fault: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("take", str(vm.qmp_path), "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"STILLFRAME_FAULT": fault},
    )


def lost(store: Store) -> dict[str, list[str]]:
    return api.check(store=store, read_data=1.0).lost


def test_taken_and_restored_by_name(guest: GuestVm, store: Store) -> None:
    code, reply, complaints = finish(start_take(guest, "--tag", "first"))
    assert code == 0, complaints
    first = store.find(f"{NAME}@first")
    assert reply["id"] == first.id
    assert first.parent is None
    tick = guest.wait_tick().n
    code, _, complaints = finish(start_take(guest))
    assert code == 0, complaints
    second = store.find(f"{NAME}@latest")
    assert second.parent == first.id
    assert second.file_bytes < first.file_bytes / 2
    full = api.take(str(guest.qmp_path), full=True).wait(120)
    assert store.find(full.id[:8]).parent is None
    for entry in store.list():
        with store.open(entry) as snapshot:
            snapshot.verify()
    vm = api.restore(second.short_id)
    assert_goes_on(vm, after_tick=tick)
    assert vm.wait_resident(60)
    vm.kill()
    (clone,) = api.fork(f"{NAME}@first")
    of_clone = store.find(api.take(clone.pid).wait(120).id)  # it knows itself what it has changed
    assert (of_clone.vm, of_clone.parent) == (clone.name, first.id)
    with store.open(of_clone) as snapshot:
        snapshot.verify()
    with pytest.raises(RefusedError, match=second.short_id):
        api.rm(first.id)
    assert lost(store) == {}


def test_ten_snapshots_cost_what_changed(store: Store) -> None:
    """Of a guest that changes 2 % of its RAM between them: 1.2 times a compressed base and the
    compressed changed pages at most. The tenth is what a full one of the same stop is."""
    before: dict[tuple[str, int], bytes | None] = {}
    fair = 0
    with GuestVm("linux", ram_mib=128, mem_mib=3, populate_mib=48, name="ten").start() as vm:
        passes = 0
        for number in range(10):
            while number and vm.wait_tick().passes < passes + 2:
                pass  # until it has written all of them again
            if number == 9:
                with QmpClient.connect(str(vm.qmp_path)) as client:
                    client.execute("stop")
            with store.open(store.find(api.take("ten").wait(120).id)) as snapshot:
                now = _pages(snapshot)
            changed = [page or bytes(4096) for key, page in now.items() if before.get(key) != page]
            assert number == 0 or 400 < len(changed) < 2000
            fair += sum(
                len(compress_frame(b"".join(changed[first : first + 256]), 3).data)
                for first in range(0, len(changed), 256)
            )
            before = now
            passes = vm.wait_tick().passes if number < 9 else passes
        with store.open(store.find(api.take("ten", full=True).wait(120).id)) as whole:
            assert _pages(whole) == before
    assert sum(entry.file_bytes for entry in store.list()[:10]) < 1.2 * fair


def _pages(snapshot: Snapshot) -> dict[tuple[str, int], bytes | None]:
    return {
        (block.idstr, page): content
        for block in snapshot.blocks
        for page, content in snapshot.iter_pages(block.idstr)
    }


def test_the_chain_ends_where_the_store_says(guest: GuestVm, tmp_path: Path, store: Store) -> None:
    short = api.init(tmp_path / "short", full_every=2)
    taken = [api.take(str(guest.qmp_path), store=short).wait(120).id for _ in range(3)]
    parents = [short.find(one).parent for one in taken]
    assert parents == [None, taken[0], None]


def test_a_parent_that_cannot_be_read_makes_it_full(guest: GuestVm, store: Store) -> None:
    first = api.take(str(guest.qmp_path)).wait(120)
    path = Path(store.location(store.find(first.id)))
    path.write_bytes(path.read_bytes()[:1000])
    second = api.take(str(guest.qmp_path)).wait(120)
    assert any("cannot be read" in note for note in second.notes)
    assert store.find(second.id).parent is None
    assert set(lost(store)) == {first.id}


@pytest.mark.parametrize("point", STORE_POINTS)
def test_an_exception_at_the_end(guest: GuestVm, store: Store, point: str) -> None:
    code, reply, complaints = finish(start_take(guest, fault=point))
    assert (code, reply["guest_state"]) == (70, "running"), complaints
    assert len(store.list()) == (point == "entered")
    assert api.check(store=store).findings == ()
    assert guest.is_progressing()


@pytest.mark.parametrize("point", STORE_POINTS)
def test_a_kill_at_the_end(guest: GuestVm, store: Store, point: str) -> None:
    code, _, _ = finish(start_take(guest, fault=f"{point}=kill"))
    assert code == -9
    assert len(store.list()) == (point == "entered")
    api.repair(store=store)
    (entry,) = store.list()
    with store.open(entry) as snapshot:
        snapshot.verify()
    assert api.check(store=store).findings == ()


def test_kill_at_random_moments(guest: GuestVm, store: Store) -> None:
    """Whatever moment it is: what the store lists is whole, and the guest goes on."""
    began_s = time.monotonic()
    assert finish(start_take(guest))[0] == 0
    usual_s = time.monotonic() - began_s
    rng = random.Random(11)
    for _ in range(4):
        process = start_take(guest)
        try:
            process.wait(rng.uniform(0.3, 1.1) * usual_s)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate(timeout=60)
        assert lost(store) == {}
        assert guest.is_progressing()
    api.repair(store=store)
    assert api.check(store=store, read_data=1.0).findings == ()
    assert finish(start_take(guest))[0] == 0
    with store.open(store.find(f"{NAME}@latest")) as snapshot:
        snapshot.verify()


def test_disks_belong_to_the_snapshot(store: Store, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    drive = ("-drive", f"file={disk},format=raw,if=virtio,id=vda")
    with BareVm(*SMALL, "-name", NAME, *drive) as vm:
        api.take(vm.qmp, max_drain_ms=PATIENT_MS).wait(60)
    entry = store.find(f"{NAME}@latest")
    assert entry.disks_bytes >= 1 << 20
    assert lost(store) == {}
    restored = api.restore(f"{NAME}@latest", wait=True, verify_disks=True)
    with pytest.raises(RefusedError, match=f"pid {restored.pid}"):
        api.rm(entry.id)
    kept = put(store, vm=NAME)
    store.tag(kept, ["kept"])
    pruning = api.prune(keep_tags=["kept"])
    assert str(restored.pid) in pruning.needed[entry.id]
    restored.kill()
    api.rm(entry.id, kept.id)
    assert store.backend.listing(SNAPSHOTS) == []


def test_copied_disks_come_along(store: Store, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    drive = ("-drive", f"file={disk},format=raw,if=virtio,id=vda")
    with BareVm(*SMALL, "-name", NAME, *drive) as vm:
        taken = api.take(vm.qmp, max_drain_ms=PATIENT_MS).wait(60)
    other = api.init(tmp_path / "other")
    api.copy(to=other)
    api.rm(taken.id)
    assert lost(other) == {}
    entry = other.find(f"{NAME}@latest")
    restored = api.restore(other.location(entry), wait=True, verify_disks=True)
    with pytest.raises(RefusedError, match=f"pid {restored.pid}"):
        api.rm(entry.id, store=other)
    restored.kill()


def test_a_snapshot_that_is_removed_while_a_vm_starts(
    guest: GuestVm, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM, which could not go on, is ended, and that is said."""
    from stillframe.restore import start

    api.take(str(guest.qmp_path)).wait(120)
    write_vm = start.write_vm

    def after_the_look(vm: api.RestoredVm) -> None:
        store.remove(store.list())
        write_vm(vm)

    monkeypatch.setattr(start, "write_vm", after_the_look)
    with pytest.raises((BusyError, NotFoundError)):
        api.restore(f"{NAME}@latest", wait=True)
    assert list_restored() == []


def test_what_cannot_be_written_to_is_said_first(
    guest: GuestVm, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "store" / "pending").write_text("in the way")
    code, reply, _ = finish(start_take(guest))
    assert (code, reply["guest_state"]) == (7, "running")
    assert not (tmp_path / "store" / SNAPSHOTS).exists()
    assert PENDING == "pending/"
