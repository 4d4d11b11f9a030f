"""Export of a snapshot to forms that other programs read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, get_args

from stillframe.errors import UsageError, check_choice
from stillframe.still.compact import compact
from stillframe.still.export_elf import export_elf
from stillframe.still.export_libvirt import export_libvirt
from stillframe.still.export_qemu import export_qemu
from stillframe.still.export_raw import export_raw
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Sink
from stillframe.still.snapshot import Snapshot

ExportFormat = Literal["qemu", "raw", "elf", "libvirt", "libvirt-zstd", "still"]
EXPORT_FORMATS: Final[tuple[ExportFormat, ...]] = get_args(ExportFormat)


def check_export(form: ExportFormat, block: str | None) -> None:
    """Raise UsageError if there is no such form, or it cannot hold just one block."""
    check_choice("format", form, EXPORT_FORMATS)
    if block is not None and form != "raw":
        raise UsageError(f"format {form} holds all blocks", remedy="one block: format raw")


def export_snapshot(
    snapshot: Snapshot,
    sink: Sink,
    form: ExportFormat,
    *,
    block: str | None = None,
    own_key: Callable[[DataKey | None], DataKey | None],
) -> None:
    """Write a snapshot into a sink, which is committed, or aborted on failure.

    Args:
        block: the block to write; only with ``raw``.
        own_key: turns the snapshot's key into one that can seal a stand-alone file.

    Raises:
        UsageError, RefusedError, NotFoundError: the snapshot has no such form.
        DataError: it is damaged. SinkError: the destination cannot take it.
    """
    if form == "qemu":
        export_qemu(snapshot, sink)
    elif form == "elf":
        export_elf(snapshot, sink)
    elif form == "raw":
        export_raw(snapshot, sink, block=block)
    elif form == "still":
        compact(snapshot, sink, key=own_key(snapshot.data_key))
    else:
        export_libvirt(snapshot, sink, zstd=form == "libvirt-zstd")
