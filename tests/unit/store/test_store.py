"""A store: what goes in is found, what goes out is gone, and what is needed stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stillframe.errors import BusyError, DataError, NotFoundError, RefusedError, UsageError
from stillframe.still.sealing import new_data_key
from stillframe.store import small_objects
from stillframe.store.backends.objects import StoredObject
from stillframe.store.opening import make_store, open_store
from stillframe.store.records import PENDING, REMOVING, Entry, catalog_key, data_key
from stillframe.store.retention import Policy
from stillframe.store.store import Store
from stillframe.store.workers import Note, Worker, this_process
from tests.support_store.stores import folder_store, put, write_into

ROOT_FILES = ["config"]


@pytest.fixture(params=["plain", "encrypted"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    key = new_data_key() if request.param == "encrypted" else None
    return folder_store(tmp_path / "store", key=key)


def keys(store: Store) -> list[str]:
    return [one.key for one in store.backend.listing("")]


def gone_worker() -> Worker:
    """A process of this host that has ended."""
    us = this_process()
    return Worker(boot=us.boot, namespace=us.namespace, pid=us.pid, started=1, since_s=us.since_s)


def far_worker(since_s: float) -> Worker:
    return Worker(boot="another", namespace="host", pid=1, started=1, since_s=since_s)


def leave(store: Store, prefix: str, name: str, about: str, worker: Worker) -> None:
    """A note of that process."""
    assert store.backend.create(prefix + Note(name=name, worker=worker, about=about).key, b"")


class TestOpening:
    def test_made_once(self, tmp_path: Path) -> None:
        made = make_store(tmp_path / "s")
        assert open_store(tmp_path / "s").config == made.config
        assert open_store(f"file://{tmp_path}/s").config == made.config
        with pytest.raises(UsageError, match="is a store already"):
            make_store(tmp_path / "s")

    def test_not_among_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").touch()
        with pytest.raises(UsageError, match="not empty"):
            make_store(tmp_path)

    def test_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="stillframe init"):
            open_store(tmp_path)
        with pytest.raises(UsageError, match="gopher"):
            open_store("gopher://x")
        (tmp_path / "config").write_bytes(b"x")
        with pytest.raises(DataError, match="repair"):
            open_store(tmp_path)

    def test_the_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("STILLFRAME_STORE", raising=False)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        assert make_store().description == str(tmp_path / "stillframe" / "store")
        monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "other"))
        assert make_store().description == str(tmp_path / "other")

    def test_others_cannot_look_in(self, store: Store, tmp_path: Path) -> None:
        entry = put(store)
        assert (tmp_path / "store").stat().st_mode & 0o066 == 0
        assert Path(store.location(entry)).stat().st_mode & 0o077 == 0


class TestWriting:
    def test_found_again(self, store: Store) -> None:
        first = put(store, created="2026-01-02T03:04:05+00:00")
        second = put(store, created="2026-01-02T03:04:06+00:00", parent=first)
        other = put(store, vm="db", created="2026-01-01T00:00:00+00:00")
        assert list(store.list()) == [other, first, second]
        assert list(store.list(["db"])) == [other]
        assert second.parent == first.id
        assert store.catalog().chain(second) == [second, first]
        with store.open(second) as snapshot:
            assert snapshot.id == second.id
            assert snapshot.verify().data_pages == 8
        assert [key for key in keys(store) if key.startswith((PENDING, REMOVING))] == []

    def test_nothing_before_the_commit_and_nothing_after_an_abort(self, store: Store) -> None:
        with store.target() as target:
            write_into(target, disk=b"disk" * 1000)
            assert list(store.list()) == []
        assert keys(store) == ROOT_FILES

    def test_the_same_snapshot_twice_is_there_once(self, tmp_path: Path) -> None:
        store = folder_store(tmp_path / "plain")  # what is encrypted is never the same
        pages = {(0, page): b"x" * 4096 for page in range(8)}
        first = put(store, pages=pages)
        assert put(store, pages=pages) == first
        assert len(keys(store)) == 3

    def test_what_was_not_written_whole_is_not_entered(self, store: Store) -> None:
        with store.target() as target:
            target.sink.write(b"half a snapshot")
            target.sink.commit()
            with pytest.raises(DataError):
                target.commit()
        assert keys(store) == ROOT_FILES

    def test_not_on_a_parent_that_is_being_removed(self, store: Store) -> None:
        parent = put(store)
        leave(store, REMOVING, parent.name, parent.id, this_process())
        with pytest.raises(BusyError, match="being removed"):
            store.target(parent)
        assert not store.backend.listing(PENDING)


class TestRemoving:
    def test_with_all_that_belongs_to_it(self, store: Store) -> None:
        entry = put(store, disk=b"disk" * 1000)
        assert entry.disks_bytes == 4000
        store.tag(entry, ["nightly"])
        store.remove([entry])
        assert keys(store) == ROOT_FILES

    def test_a_parent_stays(self, store: Store) -> None:
        first = put(store)
        second = put(store, parent=first)
        third = put(store, parent=second)
        with pytest.raises(RefusedError, match=f"{second.short_id}|{third.short_id}"):
            store.remove([first])
        with pytest.raises(RefusedError):
            store.remove([first, second])
        assert len(store.list()) == 3
        store.remove([first, second, third])
        assert keys(store) == ROOT_FILES

    def test_what_a_vm_needs_stays(self, store: Store) -> None:
        first = put(store)
        second = put(store, parent=first)

        def needed(entry: Entry) -> str | None:
            return "VM web1-1 (pid 7)" if entry == second else None

        with pytest.raises(RefusedError, match=r"web1-1 \(pid 7\)"):
            store.remove([second], needed_by=needed)
        with pytest.raises(RefusedError):
            store.remove([first, second], needed_by=needed)
        assert len(store.list()) == 2
        assert not store.backend.listing(REMOVING)

    def test_what_is_being_built_on_stays(self, store: Store) -> None:
        first = put(store)
        with store.target(first), pytest.raises(RefusedError, match="being taken"):
            store.remove([first])
        store.remove([first])

    def test_the_note_of_a_dead_take_holds_nothing(self, store: Store) -> None:
        first = put(store)
        for number, worker in enumerate((gone_worker(), far_worker(0.0))):
            leave(store, PENDING, f"x{number}", first.name, worker)
        store.remove([first])

    def test_the_note_of_another_host_holds_for_a_day(self, store: Store) -> None:
        first = put(store)
        leave(store, PENDING, "x", first.name, far_worker(this_process().since_s - 3600))
        with pytest.raises(RefusedError, match="being taken"):
            store.remove([first])

    def test_a_removal_that_somebody_does_now(self, store: Store) -> None:
        entry = put(store)
        leave(store, REMOVING, entry.name, entry.id, this_process())
        store.remove([entry])
        assert len(keys(store)) == 2  # the other's note

    def test_a_removal_whose_process_died(self, store: Store) -> None:
        entry = put(store)
        leave(store, REMOVING, entry.name, entry.id, gone_worker())
        store.prune(Policy(last=1))
        assert list(store.list()) == [entry]
        store.remove([entry])
        assert keys(store) == ROOT_FILES

    def test_not_where_the_catalog_is_damaged(self, store: Store, tmp_path: Path) -> None:
        first, second = put(store), put(store, vm="db")
        (tmp_path / "store" / catalog_key(second.id)).write_bytes(b"{}")
        with pytest.raises(DataError, match="repair"):
            store.remove([first])
        assert store.backend.listing(data_key(first.name))

    def test_append_only(self, tmp_path: Path) -> None:
        store = folder_store(tmp_path / "s", append_only=True)
        entry = put(store)
        store.tag(entry, ["a"])
        for refused in (
            lambda: store.remove([entry]),
            lambda: store.prune(Policy(last=1)),
            lambda: store.tag(entry, drop=["a"]),
        ):
            with pytest.raises(RefusedError, match="append-only"):
                refused()
        assert store.catalog().tags == {entry.id: ("a",)}


class TestPruning:
    def entries(self, store: Store, count: int) -> list[Entry]:
        """A chain of them, an hour apart."""
        found: list[Entry] = []
        for hour in range(count):
            created = f"2026-01-02T{hour:02}:30:00+00:00"
            found.append(put(store, created=created, parent=found[-1] if found else None))
        return found

    def test_parents_of_what_is_kept_stay(self, store: Store) -> None:
        entries = self.entries(store, 3)
        lone = put(store, vm="db", created="2026-01-01T00:00:00+00:00")
        old = put(store, vm="db", created="2025-01-01T00:00:00+00:00")
        dry = store.prune(Policy(last=1), dry_run=True)
        assert len(store.list()) == 5
        done = store.prune(Policy(last=1))
        assert dry == done
        assert set(done.kept) == {entries[2].id, lone.id}
        assert set(done.needed) == {entries[0].id, entries[1].id}
        assert entries[2].short_id in done.needed[entries[0].id]
        assert done.removed == (old,)
        assert done.freed_bytes == old.own_bytes
        with store.open(entries[2]) as snapshot:
            snapshot.verify()

    def test_only_of_one_vm(self, store: Store) -> None:
        self.entries(store, 1)
        old, _ = (put(store, vm="db", created=f"2026-01-0{n}T00:00:00+00:00") for n in (1, 2))
        put(store, created="2025-01-01T00:00:00+00:00")
        assert store.prune(Policy(last=1), vms=["db"]).removed == (old,)
        with pytest.raises(NotFoundError, match="'none'"):
            store.prune(Policy(last=1), vms=["none"])

    def test_without_a_policy_nothing_goes(self, store: Store) -> None:
        put(store)
        for policy in (Policy(), Policy(last=-2)):
            with pytest.raises(UsageError):
                store.prune(policy)
        assert len(store.list()) == 1

    def test_a_tag_that_nothing_has_removes_nothing(self, store: Store) -> None:
        entry = put(store)
        put(store, vm="db")
        store.tag(entry, ["release"])
        for tag in ("relaese", "release"):  # the other VM has neither
            with pytest.raises(UsageError, match="would be kept"):
                store.prune(Policy(tags=(tag,)))
        assert len(store.list()) == 2
        assert store.prune(Policy(tags=("release",)), vms=["web1"]).removed == ()
        assert store.prune(Policy(tags=("relaese",), last=1)).removed == ()

    def test_ends_what_a_dead_process_began(self, store: Store) -> None:
        entry = put(store, disk=b"disk")
        store.tag(entry, ["a"])
        leave(store, REMOVING, entry.name, entry.id, gone_worker())
        store.prune(Policy(last=1))
        assert list(store.list()) == [entry]  # it had not begun
        leave(store, REMOVING, entry.name, entry.id, gone_worker())
        store.backend.delete(catalog_key(entry.id))
        store.prune(Policy(last=1))
        assert keys(store) == ROOT_FILES


def test_tags(store: Store) -> None:
    entry = put(store)
    store.tag(entry, ["b", "a", "a"])
    assert store.catalog().tags == {entry.id: ("a", "b")}
    store.tag(entry, ["c"], drop=["b", "z"])
    assert store.catalog().tags == {entry.id: ("a", "c")}
    for wrong in ("latest", "a b", "", "-a", "2026-01-02", "x" * 65, "a/b"):
        with pytest.raises(UsageError, match="cannot be a tag"):
            store.tag(entry, [wrong])
    store.remove([entry])
    with pytest.raises(BusyError):
        store.tag(entry, ["a"])


class TestListingMeanwhile:
    """No listing of a folder shows one moment (readdir(3))."""

    def test_what_came_shows_with_its_parents(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chain = [put(store)]
        for _ in range(2):
            chain.append(put(store, parent=chain[-1]))
        missed = {catalog_key(entry.id) for entry in chain[:2]}
        listing = store.backend.listing
        monkeypatch.setattr(
            store.backend,
            "listing",
            lambda prefix: [one for one in listing(prefix) if one.key not in missed],
        )
        assert store.catalog().chain(chain[2]) == chain[::-1]

    def test_what_went_does_not_show_without_its_parent(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stays = put(store, vm="other")
        parent = put(store)
        child = put(store, parent=parent)
        read = store.backend.read

        def remove_on_the_way(key: str) -> bytes:
            if key == catalog_key(parent.id):
                monkeypatch.undo()
                store.remove([child, parent])
            return read(key)

        monkeypatch.setattr(store.backend, "read", remove_on_the_way)
        monkeypatch.setattr(store.backend, "listing", _child_first(store, catalog_key(child.id)))
        assert set(store.catalog().entries) == {stays.id}

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_however_a_chain_of_three_goes_nothing_shows_without_its_parent(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
    ) -> None:
        """Removed, children first, before the catalog's first, second, ... read."""
        for reads in range(8):
            chain = [put(store)]
            for _ in range(2):
                chain.append(put(store, parent=chain[-1]))
            left = [reads]
            read, listing = store.backend.read, store.backend.listing

            def counted(
                key: str, chain: list[Entry] = chain, left: list[int] = left, read: Any = read
            ) -> bytes:
                if left[0] == 0:
                    for entry in reversed(chain):
                        store.backend.delete(catalog_key(entry.id))
                left[0] -= 1
                return bytes(read(key))

            def shuffled(
                prefix: str, chain: list[Entry] = chain, listing: Any = listing
            ) -> list[StoredObject]:
                keys = [catalog_key(chain[n].id) for n in order]
                return sorted(listing(prefix), key=lambda one: [*keys, one.key].index(one.key))

            with monkeypatch.context() as patch:
                patch.setattr(store.backend, "read", counted)
                patch.setattr(store.backend, "listing", shuffled)
                catalog = store.catalog()
            for entry in catalog.entries.values():
                assert catalog.chain(entry)
            for entry in chain:
                store.backend.delete(catalog_key(entry.id))

    @pytest.mark.parametrize("parent", ["..", "../../etc/x", "/x", "", "\0", "a" * 300, "z" * 64])
    def test_a_parent_that_is_no_id_damages_one_entry_only(self, store: Store, parent: str) -> None:
        good, bad = put(store), put(store)
        key = catalog_key(bad.id)
        store.backend.delete(key)
        changed = msgspec.structs.replace(bad, parent=parent)
        assert store.backend.create(key, small_objects.encoded(changed))
        catalog = store.catalog()
        assert set(catalog.entries) == {good.id}
        assert set(catalog.damaged) == {bad.id}

    def test_a_parent_that_is_lost_stays_lost(self, store: Store) -> None:
        parent = put(store)
        child = put(store, parent=parent)
        store.backend.delete(catalog_key(parent.id))
        assert set(store.catalog().entries) == {child.id}
        with pytest.raises(NotFoundError, match="the parent of"):
            store.catalog().chain(child)


def _child_first(store: Store, key: str) -> Callable[[str], list[StoredObject]]:
    listing = store.backend.listing
    return lambda prefix: sorted(listing(prefix), key=lambda one: one.key != key)
