"""Export as the plain migration stream, which any QEMU loads with ``-incoming``."""

from __future__ import annotations

from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot


def export_qemu(snapshot: Snapshot, sink: Sink) -> None:
    """Write the verified stream (the output of ``zstd -dc``) and commit the sink.

    Raises:
        RefusedError: the snapshot is for analysis only. DataError: it is damaged.
        SinkError: the destination cannot take it.
    """
    try:
        snapshot.check_restorable()
        for piece in snapshot.iter_stream():
            sink.write(piece)
        sink.commit()
    finally:
        sink.abort()
