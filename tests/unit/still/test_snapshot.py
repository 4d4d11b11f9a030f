"""Writing and reading whole snapshot files."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import threading
from itertools import accumulate
from pathlib import Path

import pytest

from stillframe.errors import DataError, InternalError, NotFoundError, SinkError, UsageError
from stillframe.still.frames import LEVEL_NONE, digest_of
from stillframe.still.index import KIND_ZERO, PageRun
from stillframe.still.index_builder import PACKED_RUN, pack_runs
from stillframe.still.index_codec import encode_index
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.store import open_snapshot
from tests.support_store.faulty import FaultySink
from tests.support_store.memory import MemorySink, MemorySource
from tests.support_store.small import (
    BLOCKS,
    PAGE,
    head,
    manifest,
    open_bytes,
    ram_frame,
    random_ram,
    small_file,
    tail,
    write_ram,
    write_small,
)
from tests.support_store.tamper import Parts


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("level", [1, LEVEL_NONE])
def test_every_page_reads_back(shuffled: bool, level: int) -> None:
    sink = MemorySink()
    snapshot_id, stream, ram = write_small(sink, seed=3, level=level, shuffled=shuffled)
    snapshot = Snapshot(MemorySource(sink.content))
    assert snapshot.id == snapshot_id
    assert len(snapshot_id) == 64
    for (block, page), content in ram.items():
        assert snapshot.read_page(BLOCKS[block][0], page) == (content or bytes(PAGE))
    for number, (name, _) in enumerate(BLOCKS):
        expected = {page: content for (block, page), content in ram.items() if block == number}
        assert dict(snapshot.iter_pages(name)) == expected
    assert b"".join(snapshot.iter_stream()) == stream
    assert snapshot.manifest.stream_bytes == len(stream)
    report = snapshot.verify()
    assert report.data_pages == sum(content is not None for content in ram.values())
    assert report.zero_pages == sum(content is None for content in ram.values())
    assert (report.missing_pages, report.superseded_pages) == (0, 0)
    assert report.devices == ("timer",)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="missing program: zstd")
def test_plain_zstd_gives_the_stream() -> None:
    sink = MemorySink()
    _, stream, _ = write_small(sink)
    done = subprocess.run(
        ["zstd", "-dc"], input=sink.content, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == stream


def test_the_seek_table_is_zstds() -> None:
    """Read as contrib/seekable_format describes it, without our code."""
    content = small_file()
    frames, descriptor, magic = struct.unpack("<IBI", content[-9:])
    assert (descriptor, magic) == (0, 0x8F92EAB1)
    start = len(content) - 17 - 8 * frames
    assert struct.unpack_from("<II", content, start) == (0x184D2A5E, 8 * frames + 9)
    entries = list(struct.iter_unpack("<II", content[start + 8 : -9]))
    assert sum(stored for stored, _ in entries) == start
    offsets = [0, *accumulate(stored for stored, _ in entries)]
    for offset, (_, raw) in zip(offsets, entries, strict=False):
        skippable = (
            0x184D2A50 <= int.from_bytes(content[offset : offset + 4], "little") < 0x184D2A60
        )
        assert skippable == (raw == 0)
    assert sum(raw for _, raw in entries) == open_bytes(content).manifest.stream_bytes


def test_the_id_names_the_content() -> None:
    assert open_bytes(small_file(1)).id == open_bytes(small_file(1)).id
    assert open_bytes(small_file(1)).id != open_bytes(small_file(2)).id
    parts = Parts(small_file())
    expected = digest_of(digest_of(parts.index), digest_of(parts.manifest)).hex()
    assert open_bytes(small_file()).id == expected


def test_the_manifest_is_readable() -> None:
    assert b'"idstr": "pc.ram"' in small_file()


def test_ranges() -> None:
    sink = MemorySink()
    _, _, ram = write_small(sink)
    snapshot = open_bytes(sink.content)
    block = b"".join(ram[0, page] or bytes(PAGE) for page in range(64))
    for start, length in [(0, 0), (0, 1), (4095, 2), (5000, 30000), (64 * PAGE - 1, 1)]:
        assert snapshot.read_range("pc.ram", start, length) == block[start : start + length]
    for start, length in [(-1, 1), (0, -1), (64 * PAGE, 1), (0, 64 * PAGE + 1)]:
        with pytest.raises(UsageError, match="not in block"):
            snapshot.read_range("pc.ram", start, length)


def test_what_is_not_there() -> None:
    snapshot = open_bytes(small_file())
    with pytest.raises(NotFoundError, match=r"its blocks are: pc\.ram"):
        snapshot.read_page("pc.rma", 0)
    for page in (-1, 64, 1 << 60):
        with pytest.raises(NotFoundError, match="does not hold page"):
            snapshot.read_page("pc.ram", page)


def test_many_threads_read_one_snapshot() -> None:
    sink = MemorySink()
    _, _, ram = write_small(sink, shuffled=True)
    snapshot = open_bytes(sink.content)
    snapshot.container._cache_limit_bytes = 100_000  # so that frames are thrown out
    wrong: list[tuple[int, int]] = []

    def work() -> None:
        for (block, page), content in ram.items():
            if snapshot.read_page(BLOCKS[block][0], page) != (content or bytes(PAGE)):
                wrong.append((block, page))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_several_threads_write_one_snapshot() -> None:
    ram = random_ram(7)
    sink = MemorySink()
    writer = SnapshotWriter(sink)
    writer.append_stream(head())
    places = list(ram)

    def work(part: int) -> None:
        for start in range(part, len(places), 4):
            block, page = places[start]
            raw, runs = ram_frame([(block, page, [ram[block, page]])])
            writer.append(writer.encode(raw), pack_runs(runs))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.append_stream(tail())
    writer.finish(manifest())
    snapshot = open_bytes(sink.content)
    assert snapshot.verify().missing_pages == 0
    assert all(
        snapshot.read_page(BLOCKS[b][0], p) == (content or bytes(PAGE))
        for (b, p), content in ram.items()
    )


def test_runs_as_a_reused_buffer() -> None:
    """The native core hands over a memoryview of its own buffer."""
    raw, runs = ram_frame([(0, 0, [None] * 64), (1, 0, [None] * 16), (2, 0, [None] * 3)])
    buffer = bytearray(pack_runs(runs)) + bytearray(100)
    view = memoryview(buffer)[: len(runs) * PACKED_RUN.size]
    sink = MemorySink()
    writer = SnapshotWriter(sink)
    writer.append_stream(head())
    writer.append(writer.encode(raw), view)
    buffer[:] = b"\xff" * len(buffer)
    writer.append_stream(tail())
    writer.finish(manifest())
    assert open_bytes(sink.content).verify().zero_pages == 83


def test_a_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.still"
    path.write_bytes(small_file())
    path.chmod(0o622)
    with open_snapshot(path) as snapshot:
        assert snapshot.file_bytes == path.stat().st_size
        assert snapshot.owner_uid == path.stat().st_uid
        assert snapshot.others_may_write
        assert snapshot.verify().deep


def test_a_tail_larger_than_a_frame() -> None:
    payload = bytes(range(256)) * 10_000
    sink = MemorySink()
    with SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        write_ram(writer, random_ram(1))
        writer.append_stream(tail(payload))
        writer.finish(manifest())
    snapshot = open_bytes(sink.content)
    assert snapshot.verify().devices == ("timer",)
    assert snapshot.skeleton().devices[0].payload == payload


@pytest.mark.parametrize("script", ["E", "wQ", "wwI", "wwwwwwwE", "wwwwwwwwwwE"])
def test_a_failing_sink_is_aborted(script: str) -> None:
    sink = FaultySink(script)
    with pytest.raises(SinkError, match="the faulty sink"):
        write_small(sink)
    assert sink.calls[-1] == "abort"
    assert sink.is_empty


def test_a_failing_commit_leaves_nothing() -> None:
    sink = FaultySink("", commit="E")
    with pytest.raises(SinkError, match="No space left"):
        write_small(sink)
    assert sink.is_empty


def test_an_exception_of_the_caller_aborts() -> None:
    sink = FaultySink("")
    with contextlib.suppress(KeyError), SnapshotWriter(sink) as writer:
        writer.append_stream(head())
        raise KeyError("the caller's")
    assert sink.calls == ["write", "abort"]


def test_nothing_works_after_the_end() -> None:
    writer = SnapshotWriter(MemorySink())
    writer.append_stream(head())
    writer.finish(manifest(blocks=()))
    with pytest.raises(UsageError):
        writer.append_stream(b"more")
    with pytest.raises(UsageError):
        writer.finish(manifest())
    writer.abort()


@pytest.mark.parametrize(
    "runs",
    [
        [PageRun(3, 0, 1, KIND_ZERO, 5)],
        [PageRun(0, 64, 1, KIND_ZERO, 5)],
        [PageRun(0, 0, 65, KIND_ZERO, 5)],
        [PageRun(0, 0, 0, KIND_ZERO, 5)],
        [PageRun(0, 0, 1, 2, 5)],
        [PageRun(0, 0, 1, KIND_ZERO, 1 << 20)],
        [PageRun(0, 1 << 50, 1, KIND_ZERO, 5)],
        [PageRun(0, 0, 2, KIND_ZERO, 5), PageRun(0, 1, 1, KIND_ZERO, 50)],
    ],
)
def test_runs_that_cannot_be_are_our_bug(runs: list[PageRun]) -> None:
    sink = FaultySink("")
    writer = SnapshotWriter(sink)
    raw, _ = ram_frame([(0, 0, [None] * 64)])
    writer.append(writer.encode(raw), runs)
    with pytest.raises(InternalError), writer:
        writer.finish(manifest())
    assert sink.is_empty


def test_a_torn_packed_run_is_our_bug() -> None:
    writer = SnapshotWriter(MemorySink())
    with pytest.raises(InternalError, match="whole number"):
        writer.append(writer.encode(b"x"), b"\0" * 23)


def test_the_frame_cache_stays_small() -> None:
    snapshot = open_bytes(small_file())
    snapshot.container._cache_limit_bytes = 1
    for page in range(64):
        snapshot.read_page("pc.ram", page)
    assert len(snapshot.container._cache) == 1


def test_a_page_that_the_frame_does_not_hold() -> None:
    parts = Parts(small_file())
    index = parts.decoded()
    rows = [row for row, kind in enumerate(index.columns.kind) if kind == 1]
    index.columns.raw_offset[rows[0]] += 1
    parts.index = encode_index(index)
    snapshot = open_bytes(parts.join())
    page = index.columns.first_page[rows[0]]
    with pytest.raises(DataError, match=r"frame \d+ of memory"):
        snapshot.read_page("pc.ram", page)
