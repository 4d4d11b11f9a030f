"""Several processes at work in one store, call by call in any order: what needs what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stillframe.errors import BusyError, NotFoundError, RefusedError, SnapshotFailed
from stillframe.store import compaction
from stillframe.store.check import check_store
from stillframe.store.records import Entry
from stillframe.store.repair import repair_store
from stillframe.store.retention import Policy
from stillframe.store.store import Store
from stillframe.store.workers import GIVEN_UP_S
from tests.support_store.audit import audit
from tests.support_store.chains import ram_of
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.mortal import Died, Host, Mortal, nobody_looks
from tests.support_store.stores import Ram, put, store_on, write_into
from tests.support_store.turns import Turns

CALLS = (
    "take",
    "take on the last",
    "remove the parents",
    "remove the last",
    "remove all",
    "prune",
    "compact",
    "repair",
    "tag",
)
workers = st.tuples(st.sampled_from(CALLS), st.none() | st.tuples(st.integers(1, 6), st.booleans()))


@contextmanager
def few_files() -> Iterator[None]:
    """The third of a chain is compacted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "MOST_FILES", 2)
        yield


class Played:
    """``made``: what takes returned; ``removed``: what removals returned."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.objects.age_s = 2 * GIVEN_UP_S  # so that whole forms are relied on
        self.store = store_on(self.objects)
        self.host = Host()
        self.made: list[Entry] = []
        self.removed: set[str] = set()

    def begin(self) -> None:
        """Three that build on each other."""
        with self.host.running(self.host.start()):
            first = put(self.store, created="2026-01-01T00:00:00+00:00")
            second = put(self.store, created="2026-01-02T00:00:00+00:00", parent=first)
            third = put(self.store, created="2026-01-02T12:00:00+00:00", parent=second)
        self.before = [first, second, third]
        self.ram = {entry.id: self.ram_of(entry) for entry in self.before}

    def ram_of(self, entry: Entry) -> Ram:
        with self.store.open(entry) as snapshot:
            return ram_of(snapshot)

    def look(self) -> None:
        """What must be true at any moment."""
        catalog = audit(self.objects)
        for entry in catalog.entries.values():
            if entry.name in catalog.wholes:
                assert self.ram_of(entry) == self.ram[entry.id]

    def work(self, call: str, store: Store, number: int) -> Callable[[], None]:
        last = self.before[-1]

        def take(parent: Entry | None) -> None:
            with store.target(parent) as target:
                created = f"2026-01-03T{number:02}:00:00+00:00"
                write_into(target, parent=parent, created=created)
                self.made.append(target.commit())

        def remove(*entries: Entry) -> None:
            self.removed |= {entry.id for entry in store.remove(entries).removed}

        def prune() -> None:
            self.removed |= {e.id for e in store.prune(Policy(last=1)).removed}

        return {
            "take": lambda: take(None),
            "take on the last": lambda: take(last),
            "remove the parents": lambda: remove(*self.before[:-1]),
            "compact": lambda: store.compact() and None,
            "remove the last": lambda: remove(last),
            "remove all": lambda: remove(*self.before),
            "prune": prune,
            "repair": lambda: repair_store(store, read_data=1.0) and None,
            "tag": lambda: store.tag(last, ["a"]),
        }[call]

    def process(
        self, call: str, crash: tuple[int, bool] | None, number: int, turns: Turns
    ) -> Callable[[], None]:
        mortal = Mortal(self.objects, turns.at_call(number))
        if crash is not None:
            mortal.die_at(crash[0], after=crash[1])
        work = self.work(call, Store(mortal, self.store.config), number)
        pid = self.host.start()

        def run() -> None:
            try:
                with self.host.running(pid):
                    work()
            except (Died, RefusedError, BusyError, NotFoundError, SnapshotFailed):
                pass
            finally:
                self.host.kill(pid)

        return run


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(workers, min_size=2, max_size=3),
    st.lists(st.integers(0, 5), max_size=80),
)
@example([("take on the last", None), ("remove the last", None)], [0, 0, 1, 1, 1, 1, 1, 1, 1])
@example([("take on the last", None), ("remove the last", None)], [0] * 2 + [1] * 30)
@example([("take on the last", None), ("remove the last", None)], [1] * 4 + [0] * 30)
@example([("take on the last", None), ("remove the last", None)], [1, 0] * 40)
@example([("compact", None), ("remove the parents", None)], [0] * 20 + [1] * 40)
@example([("compact", None), ("compact", None), ("prune", None)], [0, 1] * 40)
@example([("prune", (4, True)), ("repair", None), ("remove the parents", None)], [0, 1, 2] * 40)
def test_in_any_order(calls: list[tuple[str, tuple[int, bool] | None]], order: list[int]) -> None:
    played, turns = Played(), Turns()
    with played.host.installed(), few_files():
        played.begin()
        works = [
            played.process(call, crash, number, turns) for number, (call, crash) in enumerate(calls)
        ]
        turns.run(works, iter(order), played.look)
        there = set(audit(played.objects).entries)
        written = {entry.id for entry in (*played.before, *played.made)}
        assert not there & played.removed
        if not any(crash for _, crash in calls):
            assert there == written - played.removed
        with played.host.running(played.host.start()):
            repair_store(Store(Mortal(played.objects, nobody_looks), played.store.config))
        there = set(audit(played.objects).entries)
        assert not there & played.removed
        assert {entry.id for entry in played.made} - played.removed <= there
        assert all(f.kind == "orphan" for f in check_store(played.objects).findings)


def outcomes(first: str, second: str, of_first: range, of_second: range) -> set[tuple[int, int]]:
    """How many were made and removed, in all the ways to run one after so many calls of the other,
    and back again."""
    found = set()
    for before in of_first:
        for between in of_second:
            order = [0] * before + [1] * between + [0] * 60
            played, turns = Played(), Turns()
            with played.host.installed(), few_files():
                played.begin()
                works = [played.process(c, None, n, turns) for n, c in enumerate((first, second))]
                turns.run(works, iter(order), played.look)
                assert not set(audit(played.objects).entries) & played.removed
            found.add((len(played.made), len(played.removed)))
    return found


def test_a_take_and_the_removal_of_its_parent() -> None:
    seen = outcomes("take on the last", "remove the last", range(14), range(1, 14, 2))
    # They may also see each other, and both step back.
    assert {(1, 0), (0, 1)} <= seen <= {(1, 0), (0, 1), (0, 0)}


def test_a_compaction_and_the_removal_of_its_parents() -> None:
    """They go when the whole form counts, and not before."""
    seen = outcomes("compact", "remove the parents", range(0, 26, 2), range(3, 14, 2))
    assert {(0, 0), (0, 2)} == seen


def test_a_repair_and_a_removal() -> None:
    """What is removed is not brought back by who has just seen its data."""
    seen = outcomes("repair", "remove the last", range(1, 9), range(5, 13))
    assert (0, 1) in seen
