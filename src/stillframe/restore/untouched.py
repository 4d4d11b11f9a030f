"""The untouched part of a new VM's RAM, and the stream without the zero pages that go there.

QEMU reads each page that a zero record names, and reading fills shared memory: with the full
stream, a VM would be as large as its RAM, however little of it was ever used. A page that the
waiting VM has not populated reads as zero, whatever kind of memory it is, so its record may be left
out. What the VM prefilled (``/rom@…``, device RAM, a reused file) is populated, so it is sent.
Source: QEMU ``migration/ram.c``: ram_handle_zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import StillframeError
from stillframe.machine.qemu.ramblocks import read_ram_blocks
from stillframe.model import TARGET_PAGE_BYTES
from stillframe.qmp.client import QmpClient
from stillframe.still.index import KIND_ZERO, WORD_BYTES, ZERO_RECORD_BYTES, PageRun
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate.page_records import zero_records
from stillframe.vmstate.wire import RamFlag

Touched = dict[str, list[tuple[int, int]]]
"""By block: runs (first page, past the last) that may hold something, in 4 KiB, ascending."""

_CONTINUE = int(RamFlag.CONTINUE)
_BEYOND = 1 << 64


def touched_pages(pid: int, qmp: QmpClient) -> Touched:
    """Return what a VM that waits for its stream has populated; nothing about blocks that cannot be
    inspected. The VM is not touched."""
    try:
        blocks = [block for block in read_ram_blocks(pid, qmp) if block.backing != "file"]
        capture = RamCapture(None, pid, blocks, spill_bytes=0)
        try:
            capture.learn_population()
            return {
                block.idstr: [(first, first + pages) for first, pages in runs]
                + [(block.used_length_bytes // TARGET_PAGE_BYTES, _BEYOND)]
                for block, runs in zip(blocks, capture.populated_runs(), strict=True)
            }
        finally:
            capture.close()
    except (StillframeError, OSError):
        return {}  # everything is sent, which is correct, too


def stream_to(snapshot: Snapshot, touched: Touched) -> Iterator[tuple[bytes, int]]:
    """Yield the snapshot's stream for a VM of which ``touched`` is known.

    Yields:
        A piece, and how many bytes of the whole stream it stands for.

    Raises:
        DataError: the file is damaged; what was yielded before is sound.
    """
    named: int | None = None  # the block of the last record that was sent
    for number, raw in enumerate(snapshot.iter_stream()):
        runs = snapshot.index.runs_of_frame(number) if touched else []
        if not runs:
            yield raw, len(raw)
            continue
        parts: list[bytes | memoryview] = []
        view, at = memoryview(raw), 0
        for run in runs:
            parts.append(view[at : run.raw_offset])
            name = snapshot.blocks[run.block].idstr
            first, at = _run_bytes(raw, run)
            if run.kind != KIND_ZERO:
                parts.append(_with_name(view[run.raw_offset : at], name, first, named == run.block))
                named = run.block
                continue
            for page, pages in _kept(run, touched.get(name)):
                block = None if named == run.block else name
                parts.append(zero_records(page * TARGET_PAGE_BYTES, pages, block=block))
                named = run.block
        parts.append(view[at:])
        yield b"".join(parts), len(raw)


def _run_bytes(raw: bytes, run: PageRun) -> tuple[int, int]:
    """Return (length of the name with its length byte, 0 without one; the run's end in ``raw``)."""
    named = 0
    if not int.from_bytes(raw[run.raw_offset : run.raw_offset + WORD_BYTES], "big") & _CONTINUE:
        named = 1 + raw[run.raw_offset + WORD_BYTES]
    record = ZERO_RECORD_BYTES if run.kind == KIND_ZERO else WORD_BYTES + TARGET_PAGE_BYTES
    return named, run.raw_offset + named + run.pages * record


def _with_name(
    records: memoryview, name: str, named_bytes: int, goes_on: bool
) -> bytes | memoryview:
    """Return the records; the first names its block if the record sent before is of another."""
    if named_bytes or goes_on:
        return records
    word = int.from_bytes(records[:WORD_BYTES], "big") & ~_CONTINUE
    encoded = name.encode()
    return b"".join(
        (word.to_bytes(WORD_BYTES, "big"), bytes((len(encoded),)), encoded, records[WORD_BYTES:])
    )


def _kept(run: PageRun, touched: Sequence[tuple[int, int]] | None) -> Iterator[tuple[int, int]]:
    """Yield the parts (first page, pages) of a zero run that must be sent."""
    end = run.first_page + run.pages
    if touched is None:
        touched = ((0, _BEYOND),)
    for first, past in touched:
        low, high = max(first, run.first_page), min(past, end)
        if low < high:
            yield low, high - low


def memory_needed_bytes(snapshot: Snapshot) -> int:
    """Return the ordinary memory that the restored VM's RAM takes at least, in bytes."""
    return sum(
        snapshot.index.page_counts(number)[0] * snapshot.index.target_page_bytes
        for number, block in enumerate(snapshot.blocks)
        if block.page_size_bytes == TARGET_PAGE_BYTES
    )
