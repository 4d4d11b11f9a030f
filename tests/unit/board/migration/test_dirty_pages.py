"""The set of dirty pages against a plain set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stillframe.board.migration.dirty_pages import DirtyPages

SIZES = (5, 1, 70)
PLACES = st.integers(0, 2).flatmap(
    lambda block: st.tuples(st.just(block), st.integers(0, SIZES[block] - 1), st.integers(1, 20))
)


def pages_of(block: int, first: int, count: int) -> set[tuple[int, int]]:
    return {(block, page) for page in range(first, min(first + count, SIZES[block]))}


@given(st.lists(st.tuples(st.sampled_from(["mark", "take", "next"]), PLACES), max_size=40))
def test_like_a_set(steps: list[tuple[str, tuple[int, int, int]]]) -> None:
    dirty, model = DirtyPages(SIZES), set[tuple[int, int]]()
    for what, place in steps:
        if what == "mark":
            dirty.mark(*place)
            model |= pages_of(*place)
        elif what == "take":
            runs = dirty.take(*place)
            taken = {(place[0], page) for first, n in runs for page in range(first, first + n)}
            assert taken == model & pages_of(*place)
            model -= taken
        else:
            run = dirty.next_run(place[2])
            assert (run is None) == (not model)
            if run is not None:
                assert run[2] <= place[2]
                assert pages_of(*run) <= model
                assert dirty.next_run(place[2]) == run, "it stays dirty until it is taken"
        assert dirty.count == len(model)
    listed = {
        (block, page)
        for block in range(len(SIZES))
        for first, n in dirty.runs(block)
        for page in range(first, first + n)
    }
    assert listed == model


def test_every_page_comes_once_and_in_order() -> None:
    dirty = DirtyPages(SIZES)
    dirty.mark_all()
    seen = []
    while (run := dirty.next_run(16)) is not None:
        dirty.take(*run)
        seen += [(run[0], page) for page in range(run[1], run[1] + run[2])]
    assert seen == sorted(set(seen))
    assert len(seen) == sum(SIZES)


def test_it_goes_on_where_it_is_told_to() -> None:
    dirty = DirtyPages(SIZES)
    dirty.mark_all()
    dirty.go_on_from(2, 33)
    assert dirty.next_run(4) == (2, 33, 4)
    dirty.go_on_from(0, SIZES[0])
    assert dirty.next_run(4) == (1, 0, 1)
