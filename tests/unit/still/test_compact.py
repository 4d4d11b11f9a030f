"""A chain as one file: the same RAM and state, and a stream that QEMU's parser takes."""

from __future__ import annotations

import io
import random

import pytest

from stillframe.errors import DataError, UsageError
from stillframe.still.compact import compact
from stillframe.vmstate.reader import StreamReader
from tests.support_store.chains import MadeChain, ram_of
from tests.support_store.memory import MemorySink, MemorySource
from tests.support_store.small import PAGE, open_bytes, random_ram, small_file

BLOCKS = (("pc.ram", 900 * PAGE), ("vga", 20 * PAGE))


def long_chain() -> tuple[MadeChain, dict[tuple[int, int], bytes | None]]:
    chain, ram = MadeChain(), random_ram(1, BLOCKS)
    order = list(ram)
    random.Random(1).shuffle(order)
    chain.add(ram, blocks=BLOCKS, order=order)
    for seed in range(2, 8):
        newer = random_ram(seed, BLOCKS)
        some = random.Random(seed).sample(sorted(newer), 120)
        chain.add({place: newer[place] for place in some}, blocks=BLOCKS, payload=bytes([seed]))
        ram |= {place: newer[place] for place in some}
    return chain, ram


def test_it_is_one_whole_snapshot() -> None:
    chain, ram = long_chain()
    sink = MemorySink()
    with chain.open() as snapshot:
        identity = compact(snapshot, sink)
        manifest = snapshot.manifest
    with open_bytes(sink.content) as whole:
        assert (whole.id, len(whole.files), whole.manifest.parent) == (identity, 1, None)
        assert (whole.manifest.format, whole.manifest.created) == (1, manifest.created)
        assert ram_of(whole) == ram
        report = whole.verify()
        assert (report.missing_pages, report.superseded_pages) == (0, 0)
        assert [device.payload for device in whole.skeleton().devices] == [bytes([7])]
        list(StreamReader(io.BytesIO(b"".join(whole.iter_stream()))).events())
        first_pages = [run.first_page for frame, run in whole.index.runs_of_block(0)]
        frames = [frame for frame, _ in whole.index.runs_of_block(0)]
        assert first_pages == sorted(first_pages)
        assert frames == sorted(frames)  # by address, so neighbours are in one frame
        assert whole.index.frame_count < 8


def test_an_increment_goes_on_from_it() -> None:
    chain, ram = long_chain()
    sink = MemorySink()
    with chain.open() as snapshot:
        chain.ids.append(compact(snapshot, sink))
    chain.contents.append(sink.content)
    chain.add({(0, 0): None}, blocks=BLOCKS)
    with chain.open() as snapshot:
        assert len(snapshot.files) == 2
        assert ram_of(snapshot) == ram | {(0, 0): None}


def test_one_file_is_refused() -> None:
    sink = MemorySink()
    with open_bytes(small_file()) as snapshot, pytest.raises(UsageError, match="no parent"):
        compact(snapshot, sink)


def test_damage_leaves_nothing_behind() -> None:
    chain, _ = long_chain()
    damaged = bytearray(chain.contents[0])
    damaged[len(damaged) // 3] ^= 1
    sink = MemorySink()
    with (
        chain.open(resolve=lambda child: _parent(chain, child.manifest.parent.id, damaged))  # type: ignore[union-attr]
        as snapshot,
        pytest.raises(DataError, match="damaged"),
    ):  # fmt: skip
        compact(snapshot, sink)
    with pytest.raises(UsageError, match="aborted"):
        _ = sink.content


def _parent(chain: MadeChain, identity: str, base: bytearray) -> MemorySource:
    number = chain.ids.index(identity)
    return MemorySource(bytes(base) if number == 0 else chain.contents[number])
