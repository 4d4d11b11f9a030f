"""Import of QEMU's migration stream into a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.still.import_stream import import_stream
from stillframe.still.sealing import DataKey
from stillframe.store.names import check_tag
from stillframe.store.store import Store
from stillframe.vmstate.source import Source


def import_into_store(
    stream: Source,
    store: Store,
    *,
    stillframe_version: str,
    level: int,
    key: DataKey | None,
    tags: Sequence[str],
    progress: Callable[[int], None] | None,
) -> str:
    """Import a stream as ``still.import_stream`` does, into the store; return the snapshot's id.

    Raises:
        UsageError: a tag is invalid. DataError, SinkError: as ``still.import_stream``.
    """
    for tag in tags:
        check_tag(tag)
    with store.target() as target:
        snapshot_id = import_stream(
            stream,
            target.sink,
            stillframe_version=stillframe_version,
            level=level,
            key=store.key_for_new(key),
            progress=progress,
        )
        store.tag(target.commit(), tags)
    return snapshot_id
