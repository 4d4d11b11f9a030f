"""Compaction: chains become short, and nothing else changes for anybody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillframe.errors import DataError, NotFoundError
from stillframe.store import compaction, open_snapshot
from stillframe.store import keys as keys_room
from stillframe.store.check import check_store
from stillframe.store.compaction import give_whole_form
from stillframe.store.copying import copy_snapshots
from stillframe.store.keys import Keys, make_key
from stillframe.store.records import PENDING, Entry, catalog_key, data_key
from stillframe.store.repair import repair_store
from stillframe.store.retention import Policy
from stillframe.store.store import Store
from stillframe.store.wholes import pointer_key, read_pointer, whole_key
from stillframe.store.workers import GIVEN_UP_S
from tests.support_store.audit import audit
from tests.support_store.chains import Ram, ram_of
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.small import PAGE
from tests.support_store.stores import folder_store, put, store_on

KEYS = Keys(passphrase="pass")
MOST = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MOST_FILES", MOST)


@pytest.fixture(params=["plain", "encrypted"])
def store(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    key = make_key(passphrase="pass") if request.param == "encrypted" else None
    return folder_store(tmp_path / "store", key=key)


def long_chain(store: Store, length: int, *, after: Entry | None = None) -> list[Entry]:
    """Each changes one page of eight."""
    entries = [] if after is None else [after]
    for number in range(len(entries), length):
        entries.append(
            put(
                store,
                created=f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00",
                parent=entries[-1] if entries else None,
                pages={(0, number % 8): bytes([number + 1]) * PAGE} if entries else None,
            )
        )
    return entries


def ram(store: Store, entry: Entry) -> Ram:
    with store.open(entry) as snapshot:
        assert snapshot.id == entry.id
        return ram_of(snapshot)


def chain_lengths(store: Store) -> list[int]:
    catalog = store.catalog()
    return [len(catalog.chain(entry)) for entry in catalog.entries.values()]


def damage(store: Store, key: str) -> None:
    path = store.backend.path(key)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[min(200, len(content) // 2)] ^= 1
    path.write_bytes(content)


def form_key(store: Store, entry: Entry) -> str:
    form = read_pointer(store.backend, entry.name)
    assert form is not None
    return whole_key(data_key(entry.name), form.nonce)


class TestOfALongChain:
    @pytest.fixture
    def chain(self, store: Store) -> Iterator[list[Entry]]:
        """Compacted at its end; as it was, in all that anybody sees."""
        entries = long_chain(store, 2 * MOST + 4)
        store.tag(entries[MOST], ["noted"])
        before = {entry.id: ram(store, entry) for entry in entries}
        yield entries
        assert {entry.id: ram(store, entry) for entry in store.list()} == {
            one: content for one, content in before.items() if one in store.catalog().entries
        }

    def test_no_restore_reads_more_than_the_bound(self, store: Store, chain: list[Entry]) -> None:
        done = store.compact()
        assert [one.id for one in done.compacted] == [
            chain[MOST].id,
            chain[2 * MOST].id,
        ]
        assert max(chain_lengths(store)) == MOST
        assert store.compact().compacted == ()
        assert check_store(store.backend, read_data=1.0).findings == ()
        audited = store.catalog()
        assert len(audited.entries) == len(chain)
        assert store.find("web1@noted") == chain[MOST]
        assert store.find(chain[MOST].short_id) == chain[MOST]
        with store.open(chain[-1]) as snapshot:
            assert len(snapshot.files) == MOST
        assert store.open(chain[-1]).verify().missing_pages == 0

    def test_by_path_too(self, store: Store, chain: list[Entry]) -> None:
        store.compact()
        keys = KEYS if store.key else None
        for entry in (chain[MOST], chain[-1]):
            with open_snapshot(store.location(entry), keys) as snapshot:
                assert (snapshot.id, snapshot.description) == (entry.id, store.location(entry))
                assert snapshot.content_id != entry.id
                assert ram_of(snapshot) == ram(store, entry)

    def test_what_the_policy_does_not_keep_can_go(self, store: Store, chain: list[Entry]) -> None:
        kept = chain[-3:]
        planned = store.prune(Policy(last=3), dry_run=True)
        assert len(store.list()) == len(chain)
        done = store.prune(Policy(last=3))
        assert [one.id for one in done.compaction.compacted] == [kept[0].id]
        assert (planned.compaction.compacted, planned.removed, planned.needed) == (
            done.compaction.compacted,
            done.removed,
            {},
        )
        assert [one.id for one in store.list()] == [one.id for one in kept]
        assert check_store(store.backend, read_data=1.0).findings == ()
        # Another one on top of what was compacted, and the rest goes, too.
        newest = put(store, created="2026-02-01T00:00:00+00:00", parent=kept[0])
        store.remove(kept[1:])
        assert ram(store, newest) != ram(store, kept[0])
        store.remove([newest, kept[0]])
        assert [one.key for one in store.backend.listing("snapshots/")] == []

    def test_who_reads_goes_on_reading(self, store: Store, chain: list[Entry]) -> None:
        with ExitStack() as stack:
            opened = {one.id: stack.enter_context(store.open(one)) for one in chain[-3:]}
            store.prune(Policy(last=3))
            for entry in chain[-3:]:
                assert ram_of(opened[entry.id]) == ram(store, entry)

    def test_copied_with_it(self, store: Store, chain: list[Entry], tmp_path: Path) -> None:
        store.prune(Policy(last=2))
        other = folder_store(tmp_path / "other", key=store.key)
        done = copy_snapshots(store, other, [chain[-1]])
        assert [one.id for one in done.copied] == [one.id for one in chain[-2:]]
        assert check_store(other.backend, read_data=1.0).findings == ()
        assert ram(other, other.find(chain[-1].id)) == ram(store, chain[-1])
        # What was never there: its parents.
        (other.backend.path(catalog_key(chain[-2].id)) or Path()).unlink()
        repair_store(other)
        assert ram(other, other.find(chain[-1].id)) == ram(store, chain[-1])

    def test_stopped_in_the_middle(self, store: Store, chain: list[Entry]) -> None:
        before = {one.key for one in store.backend.listing("")}
        assert store.compact(stopped=lambda: True).compacted == ()
        assert {one.key for one in store.backend.listing("")} == before

    def test_a_chain_that_cannot_be_read_stays(self, store: Store, chain: list[Entry]) -> None:
        """The parents of what could not be compacted are still needed."""
        good = chain[1]
        path = store.backend.path(data_key(good.name))
        assert path is not None
        content = path.read_bytes()
        path.unlink()
        done = store.prune(Policy(last=3))
        assert list(done.compaction.failed) == [chain[-3].id]
        assert (done.compaction.compacted, done.removed) == ((), ())
        path.write_bytes(content)
        path.chmod(0o600)

    def test_of_two_one_counts(self, store: Store, chain: list[Entry]) -> None:
        entry = chain[-1]

        def somebody_else_meanwhile() -> bool:
            if read_pointer(store.backend, entry.name) is None:
                assert give_whole_form(store, entry)
            return False

        assert give_whole_form(store, entry, somebody_else_meanwhile) is None
        assert check_store(store.backend, read_data=1.0).findings == ()
        assert store.backend.listing(PENDING) == []


class TestDamage:
    @pytest.fixture
    def entry(self, store: Store) -> Entry:
        """With a whole form, and its parents."""
        entry = long_chain(store, 3)[-1]
        give_whole_form(store, entry)
        return entry

    def test_of_a_whole_form_whose_parents_are_there(self, store: Store, entry: Entry) -> None:
        before = ram(store, entry)
        key = form_key(store, entry)
        damage(store, key)
        (finding,) = check_store(store.backend, read_data=1.0).findings
        assert (finding.kind, finding.key, finding.affects) == ("whole", key, ())
        assert repair_store(store, read_data=1.0).lost == {}
        assert check_store(store.backend, read_data=1.0).findings == ()
        assert not store.catalog().wholes
        assert ram(store, entry) == before

    def test_of_one_whose_parents_are_gone(self, store: Store, entry: Entry) -> None:
        later = put(store, created="2026-01-03T00:00:00+00:00", parent=entry, pages={(0, 0): None})
        store.remove([one for one in store.list() if one not in (entry, later)])
        damage(store, form_key(store, entry))
        report = check_store(store.backend, read_data=1.0)
        assert set(report.lost) == {entry.id, later.id}
        assert set(repair_store(store, read_data=1.0, forget=True).forgotten) == {
            entry.id,
            later.id,
        }
        assert check_store(store.backend).findings == ()

    def test_of_what_points_to_it(self, store: Store, entry: Entry) -> None:
        before = ram(store, entry)
        store.remove([one for one in store.list() if one != entry])
        damage(store, pointer_key(data_key(entry.name)))
        assert list(check_store(store.backend).lost) == [entry.id]
        with pytest.raises(DataError):
            store.open(entry)
        assert repair_store(store).lost == {}
        assert ram(store, entry) == before

    def test_of_one_that_was_not_entered(self, store: Store, entry: Entry) -> None:
        """As a compaction leaves it that dies before the last step."""
        store.backend.delete(pointer_key(data_key(entry.name)))
        (finding,) = check_store(store.backend).findings
        assert (finding.kind, finding.what) == ("leftover", "of a compaction that died")
        repair_store(store)
        assert check_store(store.backend).findings == ()
        assert audit(store.backend).is_whole(entry) if store.key is None else True

    def test_another_snapshots_is_not_taken(self, store: Store, entry: Entry) -> None:
        """Whoever can write to the store cannot put one snapshot for another, unnoticed."""
        other = put(store, created="2026-01-05T00:00:00+00:00", parent=entry)
        give_whole_form(store, other)
        for key in (form_key(store, entry), form_key(store, other)):
            assert store.backend.path(key)
        place = store.backend.path(form_key(store, entry))
        foreign = store.backend.path(form_key(store, other))
        assert place
        assert foreign
        place.write_bytes(foreign.read_bytes())
        with pytest.raises(DataError, match="no whole form"):
            store.open(entry)
        with pytest.raises(DataError, match="no whole form"):
            open_snapshot(store.location(entry), KEYS if store.key else None)


def test_an_append_only_store_is_left_alone(tmp_path: Path) -> None:
    store = folder_store(tmp_path / "store", append_only=True)
    long_chain(store, MOST + 3)
    before = {one.key for one in store.backend.listing("")}
    assert store.compact().compacted == ()
    assert {one.key for one in store.backend.listing("")} == before


def test_in_a_bucket_parents_stay_for_a_day() -> None:
    """Whoever began before reads their objects still; so does a VM of this host, however long."""
    objects = MemoryObjects()
    store = store_on(objects)
    chain = long_chain(store, MOST + 3)
    assert store.prune(Policy(last=2)).removed == ()
    assert len(store.catalog().wholes) == 1
    objects.age_s = GIVEN_UP_S + 1

    def a_vm(entry: Entry) -> str | None:
        return "a VM" if entry == chain[-1] else None

    assert store.prune(Policy(last=2), needed_by=a_vm).removed == ()
    done = store.prune(Policy(last=2))
    assert [one.id for one in done.removed] == [one.id for one in chain[:-2]]
    audit(objects)


def test_a_file_that_is_gone_meanwhile(store: Store) -> None:
    chain = long_chain(store, 3)
    store.remove(chain)
    with pytest.raises(NotFoundError):
        store.open(chain[-1])
