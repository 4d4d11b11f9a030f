"""A store against a model: takes, removals, prunes, compactions, repairs and tags, by processes
that die at any call of the backend."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stillframe.errors import BusyError, RefusedError, StillframeError
from stillframe.store import compaction
from stillframe.store.check import check_store
from stillframe.store.records import Entry
from stillframe.store.repair import repair_store
from stillframe.store.retention import Policy, kept_by
from stillframe.store.store import Store
from stillframe.store.workers import GIVEN_UP_S
from stillframe.store.writing import StoreTarget
from tests.support_store.audit import audit
from tests.support_store.chains import ram_of
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.mortal import Died, Host, Mortal, nobody_looks
from tests.support_store.stores import Ram, store_on, write_into

crashes = st.none() | st.tuples(st.integers(1, 9), st.booleans())
"""At which call the process dies, and whether after it; or it lives."""
Crash = tuple[int, bool] | None


class History(RuleBasedStateMachine):
    """``must``: what the catalog has to have. ``may``: what a process that died had written, and
    repair may bring; ``gone``: what was removed, and must never come back."""

    @initialize()
    def begin(self) -> None:
        self.objects = MemoryObjects()
        self.objects.age_s = 2 * GIVEN_UP_S  # so that whole forms are relied on
        self.ram: dict[str, Ram] = {}
        self.config = store_on(self.objects).config
        self.host = Host()
        self.stack = ExitStack()
        self.stack.enter_context(self.host.installed())
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(compaction, "MOST_FILES", 2)
        self.must: dict[str, Entry] = {}
        self.tags: dict[str, set[str]] = {}
        self.may: set[str] = set()
        self.gone: set[str] = set()
        self.at_work: list[tuple[int, Store, StoreTarget, Entry | None]] = []
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    def _process(self, crash: Crash = None) -> tuple[int, Store]:
        mortal = Mortal(self.objects, nobody_looks)
        if crash is not None:
            mortal.die_at(crash[0], after=crash[1])
        return self.host.start(), Store(mortal, self.config)

    def _some(self, number: int) -> Entry:
        return list(self.must.values())[number % len(self.must)]

    def _write(self, target: StoreTarget, parent: Entry | None) -> None:
        self.count += 1
        created = f"2026-01-{1 + self.count // 24:02}T{self.count % 24:02}:00:00+00:00"
        write_into(target, vm=f"vm{self.count % 2}", created=created, parent=parent)

    @rule(crash=crashes, parent=st.integers(0, 9))
    def take(self, crash: Crash, parent: int) -> None:
        on = self._some(parent) if self.must and parent else None
        pid, store = self._process(crash)
        before = set(self.objects.objects)
        try:
            with self.host.running(pid), store.target(on) as target:
                self._write(target, on)
                entry = target.commit()
                self.must[entry.id] = entry
        except Died:
            self.host.kill(pid)
            self._what_died_left(before)
        else:
            self.host.kill(pid)

    def _what_died_left(self, before: set[str]) -> None:
        """Of a take: it may be in the catalog, or may come there."""
        catalog = audit(self.objects)
        for entry in catalog.entries.values():
            if entry.id not in self.must:
                self.must[entry.id] = entry
        self.may |= {key for key in set(self.objects.objects) - before if key.endswith(".still")}

    @rule(parent=st.integers(0, 9))
    def begin_take(self, parent: int) -> None:
        """One that is under way while others are at work."""
        if len(self.at_work) < 2:
            on = self._some(parent) if self.must and parent else None
            pid, store = self._process()
            with self.host.running(pid):
                self.at_work.append((pid, store, store.target(on), on))

    @precondition(lambda self: getattr(self, "at_work", []))
    @rule(how=st.sampled_from(["commit", "abort", "die", "die before the entry"]))
    def end_take(self, how: str) -> None:
        pid, _, target, on = self.at_work.pop(0)
        before = set(self.objects.objects)
        with self.host.running(pid):
            if how == "abort":
                target.abort()
            elif how != "die":
                self._write(target, on)
                if how == "commit":
                    entry = target.commit()
                    self.must[entry.id] = entry
        self.host.kill(pid)
        self._what_died_left(before)

    @precondition(lambda self: getattr(self, "must", {}))
    @rule(crash=crashes, chosen=st.sets(st.integers(0, 9), min_size=1, max_size=4))
    def remove(self, crash: Crash, chosen: set[int]) -> None:
        wanted = list({one.id: one for one in map(self._some, chosen)}.values())
        ids = {one.id for one in wanted}
        held = {on.id for *_, on in self.at_work if on is not None}
        before = audit(self.objects)
        children = {before.parent_of(e) for e in self.must.values() if e.id not in ids}
        pid, store = self._process(crash)
        try:
            with self.host.running(pid):
                store.remove(wanted)
            assert not ids & (held | children)
        except RefusedError:
            assert ids & (held | self._above(held) | children)
            ids = set()
        except BusyError:
            pytest.fail("nobody else removes now")
        except Died:
            ids -= set(audit(self.objects).entries)
        self.host.kill(pid)
        self._forget(ids)

    def _above(self, ids: set[str]) -> set[str]:
        """What these build on."""
        found: set[str] = set()
        catalog = audit(self.objects)
        for one in ids:
            parent = catalog.parent_of(self.must[one])
            while parent is not None:
                found.add(parent)
                parent = catalog.parent_of(self.must[parent])
        return found

    def _forget(self, ids: set[str]) -> None:
        for one in ids:
            del self.must[one]
            self.tags.pop(one, None)
        self.gone |= ids

    @rule(crash=crashes, last=st.integers(1, 3), hourly=st.integers(0, 3))
    def prune(self, crash: Crash, last: int, hourly: int) -> None:
        policy = Policy(last=last, hourly=hourly)
        pid, store = self._process(crash)
        kept: set[str] = set()
        for vm in ("vm0", "vm1"):
            of_vm = [entry for entry in self.must.values() if entry.vm == vm]
            kept |= set(kept_by(policy, of_vm, {})) if of_vm else set()
        held = {on.id for *_, on in self.at_work if on is not None}
        try:
            with self.host.running(pid):
                done = store.prune(policy)
            assert done.compaction.failed == {}
            died = False
        except Died:
            died = True
        self.host.kill(pid)
        there = set(audit(self.objects).entries)
        stay = kept | held | self._above(kept | held)
        assert stay <= there
        if not died:
            assert there == stay
            assert {entry.id for entry in done.removed} == set(self.must) - stay
        self._forget(set(self.must) - there)

    @precondition(lambda self: getattr(self, "must", {}))
    @rule(crash=crashes, chosen=st.integers(0, 9), tag=st.sampled_from(["a", "b"]))
    def tag(self, crash: Crash, chosen: int, tag: str) -> None:
        entry = self._some(chosen)
        pid, store = self._process(crash)
        try:
            with self.host.running(pid):
                store.tag(entry, [tag])
            self.tags.setdefault(entry.id, set()).add(tag)
        except Died:
            if tag in audit(self.objects).tags.get(entry.id, ()):
                self.tags.setdefault(entry.id, set()).add(tag)
        self.host.kill(pid)

    @rule(crash=crashes)
    def compact(self, crash: Crash) -> None:
        pid, store = self._process(crash)
        try:
            with self.host.running(pid):
                assert store.compact().failed == {}
            catalog = audit(self.objects)
            assert all(len(catalog.chain(e)) <= 2 for e in catalog.entries.values())
        except Died:
            pass
        self.host.kill(pid)

    @rule(crash=crashes, forget=st.booleans())
    def repair(self, crash: Crash, forget: bool) -> None:
        pid, store = self._process(crash)
        try:
            with self.host.running(pid):
                found = repair_store(store, read_data=1.0, forget=forget)
            assert found.lost == {}
            died = False
        except Died:
            died = True
        self.host.kill(pid)
        catalog = audit(self.objects)
        assert not set(catalog.entries) & self.gone
        # An entry that is put right is away for a moment; none is wrong here.
        self.must |= {i: e for i, e in catalog.entries.items() if i not in self.must}
        if not died:
            self.may = {key for key in self.may if key in self.objects.objects}
            if not self.at_work:
                kinds = {f.kind for f in check_store(self.objects).findings}
                assert kinds <= (set() if forget else {"orphan", "leftover"})

    @invariant()
    def the_catalog_is_as_it_should_be(self) -> None:
        if not hasattr(self, "objects"):
            return
        catalog = audit(self.objects)
        assert set(catalog.entries) == set(self.must)
        store = Store(self.objects, self.config)
        for entry in catalog.entries.values():
            if entry.id not in self.ram or entry.name in catalog.wholes:
                with store.open(entry) as snapshot:
                    assert snapshot.id == entry.id
                    ram = ram_of(snapshot)
                    assert self.ram.setdefault(entry.id, ram) == ram
        assert {one: set(tags) for one, tags in catalog.tags.items() if one in self.must} == (
            self.tags
        )


History.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
TestHistory = History.TestCase
assert issubclass(StillframeError, Exception)
