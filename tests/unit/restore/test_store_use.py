"""Which snapshots of a store VMs need, seen from their records."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.errors import RefusedError
from stillframe.restore import store_use
from stillframe.restore.restored import RestoredVm
from stillframe.restore.store_use import vms_that_need
from stillframe.store.locations import real
from stillframe.store.records import data_key
from stillframe.store.store import Store
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.stores import folder_store, put, store_on


@pytest.fixture(params=["folder", "bucket"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    if request.param == "folder":
        return folder_store(tmp_path / "store")
    return store_on(MemoryObjects())


def test_what_a_vm_is_being_filled_from_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, other = put(store), put(store)
    image = tmp_path / "image.json"
    image.touch()
    vm = RestoredVm(
        pid=7,
        started=1,
        name="web2",
        snapshot=real(store.location(entry)),
        state="running",
        qmp_address="",
        log_path="",
        directory=str(tmp_path),
        disk_directory=None,
        sockets=(),
        argv=(),
        notes=(),
        image_path=str(image),
    )
    monkeypatch.setattr(store_use, "list_restored", lambda: [vm])
    needed_by = vms_that_need(store)
    assert needed_by(other) is None
    with pytest.raises(RefusedError, match=r"by VM web2 \(pid 7\)"):
        store.remove([entry], needed_by=needed_by)
    image.unlink()
    store.remove([entry], needed_by=needed_by)
    assert list(store.list()) == [other]


def test_a_domain_that_went_back_keeps_its_disks(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    entry, other = put(store), put(store)
    path = store.backend.path(data_key(entry.name))
    assert path is not None
    overlay = path.with_name(f"{path.name}.reverted-0a1b2c") / "vda.qcow2"
    overlay.parent.mkdir()
    overlay.write_bytes(b"what the domain has written since")
    with pytest.raises(RefusedError, match=r"went back .*reverted-0a1b2c"):
        store.remove([entry], needed_by=vms_that_need(store))
    assert overlay.exists()
    assert store.remove([other], needed_by=vms_that_need(store)).removed == (other,)
