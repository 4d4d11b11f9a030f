"""What differs between two snapshots: every page told right, as reading both tells."""

from __future__ import annotations

from collections import Counter

import pytest

from stillframe.errors import UsageError
from stillframe.model import GpaRange
from stillframe.still.diff import PageCounts, diff_snapshots
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate.devices import make_section
from tests.support_store.chains import MadeChain, Ram, ram_of
from tests.support_store.memory import MemorySink
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    open_bytes,
    random_ram,
    tail,
    write_ram,
)

NEW = b"new!" * (PAGE // 4)


def snapshot_of(ram: Ram, *more: object, **fields: object) -> Snapshot:
    sink = MemorySink()
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        write_ram(writer, ram)
        writer.append_stream(tail(b"state of a device", *more))  # type: ignore[arg-type]
        writer.finish(manifest(**fields))
    return open_bytes(sink.content)


def told(a: Ram, b: Ram, block: int) -> Counter[str]:
    """By comparing all pages."""
    found: Counter[str] = Counter()
    for place in [place for place in b if place[0] == block]:
        was, now = a.get(place, b""), b[place]
        if was == now:
            found["same"] += 1
        elif now is None:
            found["zeroed"] += 1
        else:
            found["changed" if was else "new"] += 1
    return found


def as_counter(pages: PageCounts) -> Counter[str]:
    return +Counter({name: getattr(pages, name) for name in pages.__struct_fields__})


@pytest.mark.parametrize("seed", range(5))
def test_pages_of_two_whole_snapshots(seed: int) -> None:
    one = random_ram(seed)
    two = {place: random_ram(seed + 100)[place] if n % 3 else old for n, (place, old) in
           enumerate(one.items())}  # fmt: skip
    found = diff_snapshots(snapshot_of(one), snapshot_of(two))
    assert not found.is_descendant
    for number, block in enumerate(found.blocks):
        assert as_counter(block.pages) == told(one, two, number)
        differ = [p for first, pages in block.ranges for p in range(first, first + pages)]
        assert differ == [p for (b, p) in two if b == number and one[b, p] != two[b, p]]


def test_the_same_one() -> None:
    one = random_ram(1)
    found = diff_snapshots(snapshot_of(one), snapshot_of(one))
    assert [block.pages.different for block in found.blocks] == [0, 0, 0]
    assert (found.devices, found.devices_same) == ((), 1)


def test_an_increment_and_its_parent() -> None:
    """What it holds is compared: it may hold a page that was written, and is the same."""
    chain, ram = MadeChain(), random_ram(5)
    again = next(place for place, content in ram.items() if content is not None)
    changes: Ram = {(0, 3): NEW, (0, 40): None, (1, 0): NEW, again: ram[again]}
    chain.add(ram)
    with chain.open() as parent:
        chain.add(changes)
        with chain.open() as child:
            found = diff_snapshots(parent, child)
            backwards = diff_snapshots(child, parent)
            assert ram_of(child) == ram | changes
    assert found.is_descendant
    assert not backwards.is_descendant
    for number, block in enumerate(found.blocks):
        assert as_counter(block.pages) == told(ram, ram | changes, number)
        assert block.ranges == backwards.blocks[number].ranges


def test_what_is_shared_is_not_read() -> None:
    chain, ram = MadeChain(), random_ram(5)
    chain.add(ram)
    parent = chain.open()
    chain.add({(0, 3): None})
    with parent, chain.open() as child:
        read: list[int] = []
        container = child.container
        child.container.read_frame = lambda n, old=container.read_frame: read.append(n) or old(n)  # type: ignore[method-assign,misc]
        diff_snapshots(parent, child)
        assert not set(read) & set(child.index.columns.frame)


def test_regions_are_guest_physical() -> None:
    ranges = (
        GpaRange(gpa=0, length_bytes=16 * PAGE, idstr="pc.ram", offset_bytes=0),
        GpaRange(gpa=1 << 32, length_bytes=48 * PAGE, idstr="pc.ram", offset_bytes=16 * PAGE),
    )
    one = random_ram(1)
    two = one | {(0, 15): NEW, (0, 16): NEW, (0, 17): NEW}
    found = diff_snapshots(snapshot_of(one), snapshot_of(two, memory_map=ranges))
    assert [(part.gpa, part.pages.different) for part in found.regions] == [(0, 1), (1 << 32, 2)]


def test_blocks_and_devices_that_come_and_go() -> None:
    extra = make_section(section_id=12, idstr="new", instance_id=3, version_id=1, payload=b"xyz")
    one = {place: content for place, content in random_ram(1).items() if place[0] < 2}
    sink = MemorySink()
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head(BLOCKS[:2]))
        write_ram(writer, one, blocks=BLOCKS[:2])
        writer.append_stream(tail(b"state of a DEVICE"))
        writer.finish(manifest(BLOCKS[:2]))
    a, b = open_bytes(sink.content), snapshot_of(random_ram(1), extra)
    found = diff_snapshots(a, b)
    assert [block.only_in for block in found.blocks] == [None, None, "b"]
    assert found.blocks[2].pages.same == 0
    assert [(d.idstr, d.instance, d.only_in, d.bytes_changed) for d in found.devices] == [
        ("timer", 0, None, 6),
        ("new", 3, "b", 3),
    ]
    back = diff_snapshots(b, a)
    assert back.blocks[2].only_in == "a"
    assert back.blocks[2].pages.absent == 3
    assert [device.only_in for device in back.devices] == [None, "a"]


def test_blanks_that_only_one_device_has_are_changes() -> None:
    longer = make_section(section_id=12, idstr="new", instance_id=3, version_id=1, payload=b"x  ")
    short = make_section(section_id=12, idstr="new", instance_id=3, version_id=1, payload=b"x")
    ram = random_ram(1)
    found = diff_snapshots(snapshot_of(ram, longer), snapshot_of(ram, short))
    assert [(d.idstr, d.bytes_changed) for d in found.devices] == [("new", 2)]


def test_pages_of_other_sizes() -> None:
    sink = MemorySink()
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        writer.finish(manifest(mode="import", target_page_bytes=8192))
    with pytest.raises(UsageError, match="different sizes"):
        diff_snapshots(snapshot_of(random_ram(1)), open_bytes(sink.content))
