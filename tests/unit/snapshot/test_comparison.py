"""Of a batch, what is as in the parent is left out, and nothing else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.model import RamBlock
from stillframe.snapshot.comparison import Comparison
from stillframe.still.index import PageRun
from stillframe.still.index_builder import pack_runs
from stillframe.still.records import read_page
from tests.support_store.chains import MadeChain, Ram
from tests.support_store.small import BLOCKS, PAGE, RAM_ID, ram_frame, random_ram

NEW_BLOCKS = (("pc.ram", 70 * PAGE), ("dimm0", 4 * PAGE), ("pc.bios", 3 * PAGE))
"""One that grew, one that is new, one that is as it was; and one is gone."""
PARENT_OF = {0: 0, 2: 2}
contents = st.sampled_from([None, b"a" * PAGE, b"\0" * (PAGE - 1) + b"\1", "same"])


def ram_blocks() -> list[RamBlock]:
    return [
        RamBlock(
            idstr=name, hva=0, used_length_bytes=size, max_length_bytes=size, page_size_bytes=PAGE
        )
        for name, size in NEW_BLOCKS
    ]


def pages_in(raw: bytes, runs: list[PageRun]) -> Ram:
    return {
        (run.block, run.first_page + n): read_page(raw, run, n, NEW_BLOCKS[run.block][0], PAGE)
        for run in runs
        for n in range(run.pages)
    }


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 5),
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 69), st.lists(contents, max_size=30)),
        max_size=6,
    ),
    st.booleans(),
)
def test_a_page_is_left_out_if_the_parent_has_it(
    seed: int, wanted: list[tuple[int, int, list[bytes | str | None]]], all_compared: bool
) -> None:
    old = random_ram(seed)
    chain = MadeChain()
    chain.add(old)
    batch: Ram = {}
    for block, first, pages in wanted:
        for page, content in enumerate(pages, first):
            if page >= NEW_BLOCKS[block][1] // PAGE:
                break
            known = old.get((PARENT_OF.get(block, 9), page))
            batch[block, page] = known if isinstance(content, str) else content
    raw, runs = ram_frame([(b, p, [c]) for (b, p), c in sorted(batch.items())], NEW_BLOCKS)
    compared = {"pc.ram", "dimm0", "pc.bios"} if all_compared else {"pc.bios"}
    with chain.open() as parent:
        comparison = Comparison(parent, ram_blocks(), compared)
        found, kept = comparison.changed(memoryview(raw), pack_runs(runs), RAM_ID, footer=True)
    if isinstance(kept, bytes):  # nothing was left out
        found, kept = raw, runs
    expected = {
        (block, page): content
        for (block, page), content in batch.items()
        if NEW_BLOCKS[block][0] not in compared
        or (PARENT_OF.get(block, 9), page) not in old
        or old[PARENT_OF[block], page] != content
    }
    assert pages_in(bytes(found), list(kept)) == expected
    assert comparison.data_pages + comparison.zero_pages == len(batch) - len(expected)
    assert BLOCKS[1][0] not in {block.idstr for block in ram_blocks()}
