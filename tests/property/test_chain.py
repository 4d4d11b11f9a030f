"""Chains of random writes read as their model, whatever was written in which order."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support_store.chains import MadeChain, Ram, ram_of
from tests.support_store.small import PAGE, random_ram

BLOCK_PAGES = {"pc.ram": 40, "vga": 7, "dimm0": 9}
contents = st.sampled_from([None, b"a" * PAGE, bytes(range(256)) * 16, b"\0" * (PAGE - 1) + b"\1"])
sizes = st.dictionaries(
    st.sampled_from(list(BLOCK_PAGES)), st.integers(1, 40), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 1000),
    st.lists(
        st.tuples(
            sizes,
            st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 39)), contents),
            st.integers(1, 25),
        ),
        max_size=5,
    ),
)
def test_a_chain_is_its_model(
    seed: int, steps: list[tuple[dict[str, int], dict[tuple[int, int], bytes | None], int]]
) -> None:
    rng = random.Random(seed)
    blocks = tuple((name, pages * PAGE) for name, pages in BLOCK_PAGES.items())
    ram = random_ram(seed, blocks)
    chain = MadeChain()
    chain.add(ram, blocks=blocks)
    model = {(blocks[block][0], page): content for (block, page), content in ram.items()}
    for new_sizes, writes, pages_per_frame in steps:
        blocks = tuple((name, pages * PAGE) for name, pages in new_sizes.items())
        places = {
            (number, page): name
            for number, (name, size) in enumerate(blocks)
            for page in range(size // PAGE)
        }
        changed: Ram = {place: content for place, content in writes.items() if place in places}
        for (number, page), name in places.items():
            if (name, page) not in model:  # a new block, or its new end: all of it
                changed.setdefault((number, page), None)
        order = list(changed)
        rng.shuffle(order)
        chain.add(changed, blocks=blocks, order=order, pages_per_frame=pages_per_frame)
        model = {
            (name, page): changed[number, page] if (number, page) in changed else model[name, page]
            for (number, page), name in places.items()
        }
    with chain.open() as snapshot:
        found = ram_of(snapshot)
        assert {(blocks[n][0], page): content for (n, page), content in found.items()} == model
        report = snapshot.verify()
        assert (report.missing_pages, report.superseded_pages) == (0, 0)
