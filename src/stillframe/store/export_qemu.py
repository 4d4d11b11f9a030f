"""Exports the plain migration stream, which any QEMU loads with ``-incoming``."""

from __future__ import annotations

from stillframe.store.backends import Sink
from stillframe.store.snapshot import Snapshot


def export_qemu(snapshot: Snapshot, sink: Sink) -> None:
    """Write the stream, and commit the sink; what ``zstd -dc`` of the file gives, checked.

    Raises:
        DataError: the snapshot is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        for piece in snapshot.iter_stream():
            sink.write(piece)
        sink.commit()
    finally:
        sink.abort()
