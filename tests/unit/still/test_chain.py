"""An increment with its parents reads as a whole snapshot does."""

from __future__ import annotations

import io

import pytest

from stillframe.errors import DataError, InternalError, LockedError, NotFoundError
from stillframe.model import DomainRecord, ParentRecord
from stillframe.still import export_libvirt
from stillframe.still.chain import Chain
from stillframe.still.container import Container
from stillframe.still.export_raw import export_raw
from stillframe.still.frames import zstd
from stillframe.still.sealing import new_data_key, unlock_with
from stillframe.still.sinks import Source
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import INCREMENT_PREAMBLE, SnapshotWriter
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Pages, ZeroRun
from tests.support_store.chains import MadeChain, Ram, ram_of
from tests.support_store.memory import MemorySink, MemorySource
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    random_ram,
    small_file,
    tail,
)

NEW = b"new!" * (PAGE // 4)
CHANGES: Ram = {(0, 3): NEW, (0, 4): None, (0, 40): NEW, (1, 0): None, (2, 2): NEW}


def two() -> tuple[MadeChain, Ram]:
    chain, ram = MadeChain(), random_ram(5)
    chain.add(ram)
    chain.add(CHANGES, payload=b"the newest state")
    return chain, ram | CHANGES


def stream_ram(stream: bytes) -> tuple[Ram, int]:
    """RAM as a loader of the stream sees it, and how many page records it has."""
    found: Ram = {}
    records = 0
    for event in StreamReader(io.BytesIO(stream)).events():
        match event:
            case Pages():
                pages = len(event.data) // PAGE
                for n in range(pages):
                    content = bytes(event.data[n * PAGE : (n + 1) * PAGE])
                    found[event.block_index, event.offset_bytes // PAGE + n] = content
                records += pages
            case ZeroRun():
                for n in range(event.pages):
                    found[event.block_index, event.offset_bytes // PAGE + n] = None
                records += event.pages
            case _:
                pass
    return found, records


def test_all_of_ram_is_there_by_every_way_of_reading() -> None:
    chain, ram = two()
    with chain.open() as snapshot:
        assert ram_of(snapshot) == ram
        for (block, page), content in ram.items():
            assert snapshot.read_page(BLOCKS[block][0], page) == (content or bytes(PAGE))
        stream = b"".join(snapshot.iter_stream())
        assert stream_ram(stream) == (ram, len(ram))  # each page once
        assert snapshot.manifest.stream_bytes == len(stream)
        sink = MemorySink()
        export_raw(snapshot, sink, block=BLOCKS[0][0])
        expected = b"".join(ram[0, page] or bytes(PAGE) for page in range(64))
        assert bytes(sink.content) == expected
        assert snapshot.id == chain.ids[-1]
        assert [file.id for file in snapshot.files] == chain.ids[::-1]


def test_devices_are_the_newest_ones() -> None:
    chain, _ = two()
    with chain.open() as snapshot:
        assert [d.payload for d in snapshot.skeleton().devices] == [b"the newest state"]


def test_verify_counts_a_whole_snapshot() -> None:
    chain, ram = two()
    with chain.open() as snapshot:
        for deep in (True, False):
            report = snapshot.verify(deep=deep)
            assert report.missing_pages == 0
            assert report.data_pages + report.zero_pages == len(ram)
        assert report.superseded_pages == 0


@pytest.mark.parametrize("depth", [3, 12])
def test_a_page_costs_one_read_of_one_file_however_deep(depth: int) -> None:
    chain = MadeChain()
    chain.add(random_ram(1))
    for number in range(depth):
        chain.add({(0, number): NEW})
    with chain.open() as snapshot:
        reads = []
        for part in snapshot.files:
            real = part.source.read_at
            part.source.read_at = lambda *a, real=real: reads.append(a) or real(*a)  # type: ignore[method-assign]
        snapshot.read_page(BLOCKS[0][0], 60)
        assert len(reads) == 1


def test_nothing_changed() -> None:
    chain, ram = MadeChain(), random_ram(2)
    chain.add(ram)
    chain.add({})
    with chain.open() as snapshot:
        assert ram_of(snapshot) == ram
        snapshot.verify()


def test_a_page_that_no_file_has_is_no_zero_page() -> None:
    ram = random_ram(3)
    del ram[0, 7]
    chain = MadeChain()
    chain.add(ram)
    chain.add({(0, 6): NEW})
    with pytest.raises(DataError, match=r"1 pages of block 'pc.ram' are neither in"):
        chain.open()


def test_an_imported_parent_may_lack_pages() -> None:
    ram = random_ram(3)
    del ram[0, 7]
    chain = MadeChain()
    chain.add(ram, mode="import")
    chain.add({(0, 6): NEW})
    with chain.open() as snapshot:
        assert snapshot.verify().missing_pages == 1


def test_blocks_that_appear_vanish_and_change_their_size() -> None:
    grown = (("pc.ram", 70 * PAGE), ("pc.bios", 2 * PAGE), ("dimm0", 4 * PAGE))
    base = random_ram(4)
    new = {(0, page): NEW for page in range(64, 70)} | {(2, page): None for page in range(4)}
    chain = MadeChain()
    chain.add(base)
    chain.add(new, blocks=grown)
    expected = (
        {(0, page): base[0, page] for page in range(64)}
        | {(1, page): base[2, page] for page in range(2)}
        | new
    )
    with chain.open() as snapshot:
        assert ram_of(snapshot) == expected
        assert stream_ram(b"".join(snapshot.iter_stream()))[0] == expected
        snapshot.verify()


def test_the_payload_of_an_increment_alone_is_no_stream() -> None:
    chain, _ = two()
    raw = Container(MemorySource(chain.contents[-1])).read_frame(0)
    assert raw == INCREMENT_PREAMBLE
    with pytest.raises(DataError):
        list(StreamReader(io.BytesIO(raw)).events())


def test_an_increment_without_its_parent_is_refused() -> None:
    chain, _ = two()
    with pytest.raises(NotFoundError, match=f"its parent {chain.ids[0]} is not given"):
        Snapshot(MemorySource(chain.contents[-1]))


@pytest.mark.parametrize("head_of_it", [None, b"no stream", head()[:-9], tail()])
def test_an_increment_whose_head_is_none_is_refused(head_of_it: bytes | None) -> None:
    chain, _ = two()
    sink = MemorySink()
    with SnapshotWriter(sink, increment=True) as writer:
        if head_of_it is not None:
            writer.append_stream(head_of_it)
        writer.finish(manifest(parent=ParentRecord(id=chain.ids[0])))
    with pytest.raises(DataError):
        Snapshot(MemorySource(sink.content), resolve=chain.resolve)


def test_another_snapshot_is_not_the_parent() -> None:
    chain, _ = two()

    def another(child: Container) -> Source:
        return MemorySource(small_file(seed=9))

    with pytest.raises(DataError, match=f"is not the parent of .*{chain.ids[0]}"):
        chain.open(resolve=another)


def test_a_chain_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillframe.still.chain.MOST_PARTS", 2)
    chain, _ = two()
    chain.add({})
    with pytest.raises(DataError, match="more than 2 snapshots"):
        chain.open()


def test_damage_to_a_parent_is_found_and_named() -> None:
    chain, _ = two()
    damaged = bytearray(chain.contents[0])
    damaged[len(head()) + 100] ^= 1

    def resolve(child: Container) -> Source:
        return MemorySource(bytes(damaged))

    for deep in (True, False):
        with chain.open(resolve=resolve) as snapshot, pytest.raises(DataError, match="digest"):
            snapshot.verify(deep=deep)


def test_damage_where_nothing_counts_any_more_is_found() -> None:
    chain = MadeChain()
    chain.add({(0, page): NEW for page in range(64)} | random_ram(1), pages_per_frame=1)
    chain.add({(0, 9): None})
    with chain.open() as snapshot:
        chained = snapshot.container
        assert isinstance(chained, Chain)
        base = chained.parts[1].index.lookup(0, 9)
        assert base is not None
        place = chained.parts[1].index.frame(base.frame).offset_bytes
    damaged = bytearray(chain.contents[0])
    damaged[place + 8] ^= 1

    def resolve(child: Container) -> Source:
        return MemorySource(bytes(damaged))

    with chain.open(resolve=resolve) as snapshot:
        assert snapshot.read_page(BLOCKS[0][0], 9) == bytes(PAGE)
        with pytest.raises(DataError, match="damaged"):
            snapshot.verify()


def test_a_writer_wants_a_parent_for_an_increment_and_for_nothing_else() -> None:
    chain, _ = two()
    parent = Container(MemorySource(chain.contents[-1])).manifest.parent
    for increment in (True, False):
        with SnapshotWriter(MemorySink(), increment=increment) as writer:
            writer.append_stream(head())
            writer.append_stream(tail())
            with pytest.raises(InternalError, match="parent"):
                writer.finish(manifest(parent=None if increment else parent))


def test_an_older_reader_does_not_take_it_for_a_whole_one() -> None:
    chain, _ = two()
    assert Container(MemorySource(chain.contents[-1])).manifest.format == 2
    assert Container(MemorySource(chain.contents[0])).manifest.format == 1


def test_encrypted_parents() -> None:
    """Each file has a key of its own; the parent's id is that of the encrypted file."""
    chain, ram = MadeChain(), random_ram(5)
    chain.add(ram, key=new_data_key())
    chain.add(CHANGES, key=new_data_key())
    assert NEW[:16] not in chain.contents[1]
    with chain.open() as snapshot:
        assert ram_of(snapshot) == ram | CHANGES
        assert snapshot.is_encrypted
        assert len(snapshot.secrets) == 2
        assert snapshot.verify().missing_pages == 0
    top = chain.keys[1]
    assert top is not None
    with pytest.raises(LockedError):
        Snapshot(
            MemorySource(chain.contents[1]),
            unlock_with({top.id: top.secret}),
            resolve=chain.resolve,
        )


def test_with_a_parent_that_is_not_it_is_not_encrypted() -> None:
    chain = MadeChain()
    chain.add(random_ram(5))
    chain.add(CHANGES, key=new_data_key())
    with chain.open() as snapshot:
        assert not snapshot.is_encrypted


def test_a_libvirt_save_image_of_a_chain_holds_all_of_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file itself would be the increment alone."""
    domain = DomainRecord(uri="", uuid="", xml="<domain/>", live_xml="<domain/>")
    monkeypatch.setattr(export_libvirt, "domain_of_snapshot", lambda snapshot: domain)
    chain, _ = two()
    sink = MemorySink()
    with chain.open() as snapshot:
        export_libvirt.export_libvirt(snapshot, sink, zstd=True)
        head = export_libvirt.save_image_head(domain.xml, domain.live_xml, running=False, zstd=True)
        assert zstd.decompress(sink.content[len(head) :]) == b"".join(snapshot.iter_stream())
