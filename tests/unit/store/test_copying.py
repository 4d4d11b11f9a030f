"""Copies between stores: a snapshot's disks come along, under the name that it has there."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.errors import DataError
from stillframe.restore.captured_disks import captured_bases, check_captured
from stillframe.store.check import check_store
from stillframe.store.copying import copy_snapshots
from stillframe.store.records import SNAPSHOTS
from stillframe.store.repair import repair_store
from stillframe.store.store import Store
from tests.support_store.audit import audit
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.mortal import Died, Host, Mortal, nobody_looks
from tests.support_store.stores import folder_store, put, store_on, write_into

DISK = b"a disk's content " * 5000


@pytest.mark.parametrize("by_bucket", [False, True])
def test_disks_are_found_in_the_other_store(tmp_path: Path, by_bucket: bool) -> None:
    first, last = folder_store(tmp_path / "first"), folder_store(tmp_path / "last")
    original, source = put(first, disk=DISK), first
    if by_bucket:
        source = store_on(MemoryObjects())
        copy_snapshots(first, source, [original])
        assert check_store(source.backend, read_data=1.0).findings == ()
    copy_snapshots(source, last, source.list())
    # Whoever looks where they were finds nothing.
    first.remove([original])
    entry = last.find(original.id)
    assert entry.name != original.name
    assert entry.disks_bytes == len(DISK)
    assert check_store(last.backend, read_data=1.0).findings == ()
    place = last.location(entry)
    with last.open(entry) as snapshot:
        (base,) = captured_bases(snapshot.manifest, place)
        assert check_captured(snapshot.manifest, place, digests=True) == []
    assert Path(base.backing).read_bytes() == DISK
    assert Path(base.backing).parent == Path(f"{place}.disks")
    Path(base.backing).unlink()
    assert [one.kind for one in check_store(last.backend).findings] == ["lost"]
    last.remove([entry])
    assert last.backend.listing(SNAPSHOTS) == []


def test_who_dies_at_any_call_has_copied_nothing_wrong_and_the_next_one_ends_it(
    tmp_path: Path,
) -> None:
    """Before and after each call that changes the other store, until a copy comes through."""
    source = folder_store(tmp_path / "source")
    first = put(source, disk=DISK)
    wanted = {first.id, put(source, parent=first).id, put(source, vm="db").id}
    source.tag(source.find(first.id), ["good"])
    deaths = 0
    for call, after in ((call, after) for call in range(1, 99) for after in (False, True)):
        host, objects = Host(), MemoryObjects()
        config = store_on(objects).config
        mortal = Mortal(objects, nobody_looks)
        mortal.die_at(call, after=after)
        with host.installed():
            pid = host.start()
            with host.running(pid):
                try:
                    copy_snapshots(source, Store(mortal, config), source.list())
                except Died:
                    deaths += 1
            host.kill(pid)
            there = Store(objects, config)
            assert check_store(objects, read_data=1.0).lost == {}
            assert {one.id for one in there.list()} <= wanted
            with host.running(host.start()):
                copy_snapshots(source, there, source.list())
                repair_store(there, forget=True)
            assert set(audit(objects).entries) == wanted
            assert there.catalog().tags == {first.id: ("good",)}
            assert check_store(objects, read_data=1.0).findings == ()
        if not mortal.is_dead:
            break
    assert deaths > 20


def test_a_file_that_holds_another_snapshot_is_not_entered(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    with store.target() as target:
        write_into(target)
        with pytest.raises(DataError, match="holds another one"):
            target.commit(expected_id="0" * 64)
    assert store.list() == []
    assert store.backend.listing(SNAPSHOTS) == []
