"""Conversion of an increment and its parents into one full snapshot.

Pages are rewritten in address order, in frames of the usual size: a chain's pages are scattered
over many files, and over frames of which little still counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from stillframe.errors import UsageError
from stillframe.still.chain import Chain
from stillframe.still.frames import FRAME_RAW_TARGET_BYTES, LEVEL_DEFAULT
from stillframe.still.host_mark import HostKey
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.ram_section import RamSection
from stillframe.still.records import is_ram_section, record_bytes
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter

_CACHE_BYTES: Final = 256 << 20
"""For frames that are read again: pages saved on a fault are not in their neighbours' frames. This
bounds the memory use, besides the index."""
_ZERO_PAGES: Final = 65536
"""The most zero pages in one run."""


def compact(
    snapshot: Snapshot,
    sink: Sink,
    *,
    level: int = LEVEL_DEFAULT,
    key: DataKey | None = None,
    whole_of: str = "",
    step: Callable[[], None] = lambda: None,
) -> str:
    """Write the chain as one file, and commit the sink; return the new snapshot's id.

    RAM, device state and the manifest, except for the parent, are the increment's. The file is
    marked as taken here if the increment is.

    Args:
        key: encrypts the file; without it, the file is encrypted like the increment.
        whole_of: the increment's id, if the file is to be read in its place.
        step: called repeatedly; an exception from it ends the work and leaves nothing behind.

    Raises:
        UsageError: the snapshot is a single file already.
        DataError: a file is damaged. SinkError: the destination cannot take it.
        HostError: the mark's key cannot be read.
    """
    chain = snapshot.container
    if not isinstance(chain, Chain):
        sink.abort()
        raise UsageError(f"{chain.source.description} has no parent", remedy="copy the file")
    with SnapshotWriter(sink, level=level, key=key or snapshot.data_key) as writer:
        chain.grow_cache(_CACHE_BYTES)
        host_key = HostKey.load_or_make() if snapshot.was_taken_here else None
        head, *tail = chain.index.frames_without_runs()
        writer.append_stream(chain.read_frame(head))
        for section in _sections(snapshot, chain):
            step()
            writer.append(writer.encode(section.finish()), section.runs)
        for number in tail:
            raw = chain.read_frame(number)
            if not is_ram_section(raw, chain.index.target_page_bytes):
                writer.append_stream(raw)
        mode = "import" if chain.may_lack_pages else snapshot.manifest.mode
        whole = msgspec.structs.replace(
            snapshot.manifest, parent=None, mode=mode, whole_of=whole_of
        )
        return writer.finish(whole, key=host_key)


def _sections(snapshot: Snapshot, chain: Chain) -> Iterator[RamSection]:
    page_bytes = chain.index.target_page_bytes
    section, length = chain.new_section(), 0
    for block, run, content in _runs(snapshot, page_bytes):
        idstr = snapshot.blocks[block].idstr
        section.add(block, idstr, run.first_page, run.pages, content)
        length += run.pages * record_bytes(run.kind, page_bytes)
        if length >= FRAME_RAW_TARGET_BYTES:
            yield section
            section, length = chain.new_section(), 0
    if section.runs:
        yield section


def _runs(snapshot: Snapshot, page_bytes: int) -> Iterator[tuple[int, PageRun, memoryview | None]]:
    """Yield all runs in address order, none longer than a frame should be."""
    stride = record_bytes(KIND_DATA, page_bytes)
    for number, block in enumerate(snapshot.blocks):
        for frame, run in snapshot.index.runs_of_block(number):
            content = None
            if run.kind == KIND_DATA:
                content = snapshot.run_content(frame, run, block.idstr)
            most = _ZERO_PAGES if content is None else max(1, FRAME_RAW_TARGET_BYTES // stride)
            for skip in range(0, run.pages, most):
                pages = min(most, run.pages - skip)
                part = None if content is None else content[skip * stride :]
                yield number, run._replace(first_page=run.first_page + skip, pages=pages), part
