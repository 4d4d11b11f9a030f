"""What check finds, and what repair makes of it: one byte anywhere, and whatever may be missing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from stillframe.errors import DataError, HostError, NotFoundError, RefusedError
from stillframe.store import keys as keys_room
from stillframe.store import small_objects
from stillframe.store.check import CheckReport, Finding, check_store
from stillframe.store.keys import Keys, make_key
from stillframe.store.opening import open_store, repaired_config
from stillframe.store.records import (
    CATALOG,
    PENDING,
    REMOVING,
    Entry,
    catalog_key,
    data_key,
    tag_key,
)
from stillframe.store.records import KEYS as KEYS_OF_STORE
from stillframe.store.repair import repair_store
from stillframe.store.retention import Policy
from stillframe.store.store import Store
from stillframe.store.workers import this_process
from stillframe.store.writing import delete_data
from tests.support_store.stores import folder_store, put, write_into
from tests.unit.store.test_store import gone_worker, leave

KEYS = Keys(passphrase="pass")


@pytest.fixture(params=["plain", "encrypted"])
def store(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    key = make_key(passphrase="pass") if request.param == "encrypted" else None
    return folder_store(tmp_path / "store", key=key)


@pytest.fixture
def chain(store: Store) -> list[Entry]:
    """Two that build on each other, and one of another VM with a disk."""
    first = put(store, created="2026-01-01T00:00:00+00:00")
    second = put(store, created="2026-01-02T00:00:00+00:00", parent=first)
    lone = put(store, vm="db", created="2026-01-03T00:00:00+00:00", disk=b"disk" * 1000)
    store.tag(lone, ["nightly"])
    return [first, second, lone]


def file(store: Store, key: str) -> Path:
    path = store.backend.path(key)
    assert path is not None
    return path


def check(store: Store) -> CheckReport:
    return check_store(store.backend, read_data=1.0)


def kinds(report: CheckReport) -> list[str]:
    return [finding.kind for finding in report.findings]


def mend(store: Store, *, forget: bool = False) -> None:
    repair_store(store, read_data=1.0, forget=forget)


def as_append_only(store: Store) -> Store:
    return Store(store.backend, msgspec.structs.replace(store.config, append_only=True))


def test_a_sound_store(store: Store, chain: list[Entry]) -> None:
    steps: list[tuple[int, int]] = []
    report = check_store(store.backend, read_data=1.0, progress=lambda *at: steps.append(at))
    assert report.is_sound
    assert report.findings == ()
    assert report.snapshots == 3
    total = sum(entry.own_bytes for entry in chain)
    assert steps[-1][0] <= total == steps[-1][1]
    repair = repair_store(store)
    assert (repair.done, repair.lost) == ((), {})
    assert list(store.list()) == chain


def test_a_share_of_the_data(store: Store, chain: list[Entry]) -> None:
    assert check_store(store.backend).read_bytes == 0
    whole = check(store).read_bytes
    some = [check_store(store.backend, read_data=0.5).read_bytes for _ in range(8)]
    assert all(0 <= one <= whole for one in some)
    assert len(set(some)) > 1


def _flip(path: Path, at: int) -> Callable[[], None]:
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return lambda: path.write_bytes(content) and None


def reads(store: Store, entry: Entry) -> bool:
    """Whether all that a restore needs of it is there."""
    try:
        with store.open(entry) as snapshot:
            return all(snapshot.iter_stream())
    except (DataError, NotFoundError):
        return False


def test_a_corrupted_byte_anywhere(store: Store, chain: list[Entry]) -> None:
    """Each byte of the small objects, and many of the large ones: what is affected is named, no
    more and no less, and everything else can be read."""
    first, second, lone = chain
    affected = {
        data_key(first.name): {first.id},
        data_key(second.name): {second.id},
        data_key(lone.name): {lone.id},
        f"{data_key(lone.name)}.disks/vda-00000000.qcow2": {lone.id},
        catalog_key(first.id): set[str](),
        catalog_key(second.id): set(),
        catalog_key(lone.id): set(),
    }
    objects = {one.key: one.bytes for one in store.backend.listing("")}
    keys = {key for key in objects if key.startswith(KEYS_OF_STORE)}
    assert set(objects) - keys == {*affected, "config", tag_key(lone.id, "nightly")}
    for key, lost in affected.items():
        step = max(1, objects[key] // 12)
        for at in [*range(0, objects[key], step), objects[key] - 1]:
            undo = _flip(file(store, key), at)
            report = check(store)
            where = (key, at)
            unreadable = {entry.id for entry in chain if not reads(store, entry)}
            assert set(report.lost) == lost | unreadable, where
            assert not report.is_sound, where
            assert {finding.key for finding in report.findings} == {key}, where
            if not lost:
                mend(store)
                assert list(store.list()) == chain, where
                assert check(store).findings == ()
            undo()
    assert check(store).is_sound


def test_a_key_that_opens_nothing_any_more(store: Store, chain: list[Entry]) -> None:
    for one in store.backend.listing(KEYS_OF_STORE):
        undo = _flip(file(store, one.key), one.bytes // 2)
        report = check(store)
        assert [(found.kind, found.key) for found in report.findings] == [("catalog", one.key)]
        undo()
    assert check(store).is_sound


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_truncated_file(store: Store, chain: list[Entry], cut: int) -> None:
    path = file(store, data_key(chain[0].name))
    path.write_bytes(path.read_bytes()[:cut])
    report = check_store(store.backend)
    assert set(report.lost) == {chain[0].id, chain[1].id}
    assert chain[1].label in report.labels.values()


def test_what_is_lost_is_named_and_kept_until_told(store: Store, chain: list[Entry]) -> None:
    file(store, data_key(chain[0].name)).unlink()
    repair = repair_store(store)
    assert set(repair.lost) == {chain[0].id, chain[1].id}
    assert "there is no file" in repair.lost[chain[0].id][0]
    assert list(store.list()) == chain
    repair = repair_store(store, forget=True)
    assert set(repair.forgotten) == {chain[0].id, chain[1].id}
    assert list(store.list()) == [chain[2]]
    assert check(store).findings == ()


def test_a_lost_catalog_is_made_anew(store: Store, chain: list[Entry]) -> None:
    for one in store.backend.listing(CATALOG):
        store.backend.delete(one.key)
    report = check(store)
    assert kinds(report) == ["orphan"] * 3 + ["leftover"]
    assert not report.is_sound
    repair = repair_store(as_append_only(store))
    assert len(repair.done) == 3
    assert list(store.list()) == chain
    assert store.catalog().tags == {chain[2].id: ("nightly",)}
    assert check(store).findings == ()


def test_an_entry_that_lies_is_put_right(store: Store, chain: list[Entry]) -> None:
    entry = chain[2]
    key = catalog_key(entry.id)
    lie = small_objects.encoded(entry)
    store.backend.delete(key)
    store.backend.create(key, small_objects.encoded(msgspec.structs.replace(entry, vm="other")))
    assert [(f.kind, f.key) for f in check(store).findings] == [("catalog", key)]
    mend(store)
    assert store.backend.read(key) == lie


def test_a_damaged_entry_of_a_lost_snapshot(store: Store, chain: list[Entry]) -> None:
    lone = chain[2]
    delete_data(store.backend, lone.name)
    file(store, catalog_key(lone.id)).write_bytes(b"rot")
    report = check(store)
    assert set(report.lost) == {lone.id}
    mend(store, forget=True)
    assert list(store.list()) == chain[:2]
    assert check(store).findings == ()


def test_a_missing_parent(store: Store, chain: list[Entry]) -> None:
    delete_data(store.backend, chain[0].name)
    store.backend.delete(catalog_key(chain[0].id))
    report = check(store)
    assert set(report.lost) == {chain[1].id}
    assert "parent" in report.lost[chain[1].id][0]


def test_what_a_dead_take_left(store: Store, chain: list[Entry]) -> None:
    def left(name: str, **fields: object) -> str:
        """A target whose process died; the data is written as ``fields`` say."""
        target = store.target()
        for one in store.backend.listing(PENDING + target.name):
            store.backend.delete(one.key)
        leave(store, PENDING, target.name, "", gone_worker())
        if fields:
            write_into(target, vm=name, **fields)  # type: ignore[arg-type]
        else:
            target.sink.abort()
        return target.name

    left("nothing")
    disks_only = left("disks", disk=b"x" * 99)
    file(store, data_key(disks_only)).unlink()
    whole = left("whole", disk=b"y" * 99)
    assert sorted(kinds(check(store))) == ["leftover"] * 4 + ["orphan"]  # three notes, a disk
    done = repair_store(store).done
    assert len(done) == 5, done  # the one that was entered, a disk, three notes
    assert [e.name for e in store.list(["whole"])] == [whole]
    assert len(store.list()) == 4
    assert check(store).findings == ()


def test_an_orphan_whose_parent_is_gone(store: Store, chain: list[Entry]) -> None:
    delete_data(store.backend, chain[0].name)
    for entry in chain[:2]:
        store.backend.delete(catalog_key(entry.id))
    assert kinds(check(store)) == ["orphan"]
    mend(store)
    assert kinds(check(store)) == ["orphan"]
    mend(store, forget=True)
    assert list(store.list()) == [chain[2]]
    assert check(store).findings == ()


def test_who_is_at_work_is_left_alone(store: Store, chain: list[Entry]) -> None:
    with store.target(chain[1]) as target:
        write_into(target, parent=chain[1])
        assert check(store).findings == ()
        mend(store)
        assert list(store.list()) == chain
        target.commit()
    assert len(store.list()) == 4


def test_an_unfinished_removal(store: Store, chain: list[Entry]) -> None:
    lone = chain[2]
    leave(store, REMOVING, lone.name, lone.id, gone_worker())
    store.backend.delete(catalog_key(lone.id))
    assert set(kinds(check(store))) == {"leftover"}
    repair_store(as_append_only(store))
    assert list(store.list()) == chain[:2]  # it is not brought back
    mend(store)
    assert check(store).findings == ()
    assert not store.backend.listing(data_key(lone.name))


def test_strays_are_named_and_left(store: Store, chain: list[Entry]) -> None:
    store.backend.create("snapshots/letter.txt", b"hello")
    store.backend.create("letter.txt", b"hello")
    store.backend.create("pending/letter.txt", b"hello")
    report = check(store)
    assert kinds(report) == ["stray"] * 3
    assert report.is_sound
    mend(store, forget=True)
    assert store.backend.read("letter.txt") == b"hello"


def test_a_finding_is_a_record() -> None:
    assert Finding(kind="stray", key="x", what="y").affects == ()
    assert this_process().is_gone is False


@pytest.mark.parametrize("kept", [b"", b'"append_only": false', b"rot"])
def test_a_damaged_configuration(
    store: Store, chain: list[Entry], tmp_path: Path, kept: bytes
) -> None:
    file(store, "config").write_bytes(kept)
    found, done = repaired_config(tmp_path / "store", KEYS)
    assert len(done) == 1
    assert found.config.append_only is (b"false" not in kept)
    assert list(open_store(tmp_path / "store", KEYS).list()) == chain


def test_forgetting_is_removing(store: Store, chain: list[Entry]) -> None:
    with pytest.raises(RefusedError, match="append-only"):
        repair_store(as_append_only(store), forget=True)


@pytest.mark.parametrize("created", ["", "yesterday", "0001-01-01", "9999-12-31T23:59:59Z"])
def test_an_entry_with_a_time_that_is_none(store: Store, chain: list[Entry], created: str) -> None:
    """The others are as they were."""
    key = catalog_key(chain[1].id)
    store.backend.delete(key)
    changed = msgspec.structs.replace(chain[1], created=created)
    store.backend.create(key, small_objects.encoded(changed))
    assert list(store.list()) == [chain[0], chain[2]]
    assert store.prune(Policy(last=-1), dry_run=True).removed == ()
    assert [(f.kind, f.key) for f in check(store).findings] == [("catalog", key)]
    mend(store)
    assert list(store.list()) == chain


def test_the_oldest_first_in_any_zone(store: Store) -> None:
    late = put(store, created="2026-01-01T23:00:00-05:00")
    early = put(store, created="2026-01-02T01:00:00+00:00")
    assert list(store.list()) == [early, late]
    assert store.find("web1@latest") == late
    assert list(store.prune(Policy(last=1), dry_run=True).kept) == [late.id]


def damage_the_seek_table(store: Store, entry: Entry) -> None:
    """Something is lost of it, which no other snapshot needs."""
    path = file(store, data_key(entry.name))
    _flip(path, path.stat().st_size - 20)
    assert set(check(store).lost) == {entry.id}


def test_what_a_sound_one_needs_is_not_forgotten(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    first = put(store, created="2026-01-01T00:00:00+00:00")
    second = put(store, created="2026-01-02T00:00:00+00:00", parent=first)
    damage_the_seek_table(store, first)
    repair = repair_store(store, forget=True)
    assert (set(repair.lost), repair.forgotten) == ({first.id}, ())
    assert repair.needed == {first.id: f"snapshot {second.label}"}
    assert list(store.list()) == [first, second]
    assert reads(store, second)
    store.remove([second])
    assert repair_store(store, forget=True).forgotten == (first.id,)
    assert store.list() == []


def test_what_a_vm_needs_is_not_forgotten(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    lone = put(store)
    damage_the_seek_table(store, lone)
    repair = repair_store(store, forget=True, needed_by=lambda _entry: "VM web1")
    assert (repair.forgotten, repair.needed) == ((), {lone.id: "VM web1"})
    assert list(store.list()) == [lone]


def test_what_another_process_builds_on_is_not_forgotten(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store")
    lone = put(store)
    damage_the_seek_table(store, lone)
    with store.target(lone) as target:
        write_into(target, parent=lone)
        assert set(repair_store(store, forget=True).needed) == {lone.id}
        assert reads(store, target.commit())


def test_a_lost_one_and_a_damaged_entry_are_both_forgotten(
    store: Store, chain: list[Entry]
) -> None:
    """Though nothing is removed while an entry is damaged."""
    first, second, lone = chain
    delete_data(store.backend, lone.name)
    file(store, catalog_key(lone.id)).write_bytes(b"rot")
    file(store, data_key(second.name)).write_bytes(b"rot")
    assert set(repair_store(store, forget=True).forgotten) == {second.id, lone.id}
    assert list(store.list()) == [first]
    assert check(store).findings == ()


def test_a_damaged_entry_of_a_snapshot_whose_parent_is_gone(
    store: Store, chain: list[Entry]
) -> None:
    """It is lost, though its file is whole; and it hinders nothing."""
    first, second, lone = chain
    delete_data(store.backend, first.name)
    store.backend.delete(catalog_key(first.id))
    file(store, catalog_key(second.id)).write_bytes(b"rot")
    file(store, data_key(lone.name)).write_bytes(b"rot")
    assert set(check(store).lost) == {second.id, lone.id}
    assert set(repair_store(store, forget=True).forgotten) == {second.id, lone.id}
    assert store.list() == []
    assert check(store).findings == ()


@pytest.mark.parametrize("for_good", [True, False])
def test_what_cannot_be_read_now_is_not_lost(
    store: Store, chain: list[Entry], monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    """Whichever read fails, and all after it or that one alone: nothing is called lost, and
    nothing is removed."""
    pread = os.pread
    objects = {one.key: store.backend.read(one.key) for one in store.backend.listing("")}
    fails_at, reads_done = -1, 0

    def failing(fd: int, length: int, offset: int) -> bytes:
        nonlocal reads_done
        reads_done += 1
        if reads_done == fails_at or (for_good and reads_done > fails_at):
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    failed = 0
    for verb in (check, lambda one: repair_store(one, read_data=1.0, forget=True)):
        fails_at, reads_done = 1 << 30, 0
        assert not verb(store).lost
        for fails_at in range(1, reads_done + 1):
            reads_done = 0
            try:
                assert not verb(store).lost, fails_at
            except HostError:
                failed += 1
            fails_at = 1 << 30
            reads_done = 0
            there = {one.key: store.backend.read(one.key) for one in store.backend.listing("")}
            assert there == objects
    assert failed > 10
