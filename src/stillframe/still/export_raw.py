"""Export as raw RAM: guest-physical memory from address 0, or one block."""

from __future__ import annotations

from stillframe.still.extents import Extent, physical_extents, write_extents
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot


def export_raw(snapshot: Snapshot, sink: Sink, *, block: str | None = None) -> None:
    """Write RAM, and commit the sink. Zero pages and gaps become holes if the sink supports them.

    Args:
        block: write only this block, from its start; else guest-physical memory, with the address
            as the file offset.

    Raises:
        UsageError: the snapshot does not record the guest-physical layout.
        NotFoundError: there is no such block.
        DataError: the snapshot is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        if block is None:
            extents = physical_extents(snapshot)
        else:
            size = snapshot.blocks[snapshot.block_number(block)].used_length_bytes
            extents = [Extent(0, block, 0, size)]
        write_extents(snapshot, sink, extents)
    finally:
        sink.abort()
