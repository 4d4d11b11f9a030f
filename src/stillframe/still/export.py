"""Writes a snapshot's content in a form that other programs read: which forms there are."""

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
    """Raise UsageError if there is no such form, or it cannot hold one block only."""
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
        block: only with ``raw``: the block to write.
        own_key: makes the snapshot's key one that a file of its own can be sealed with.

    Raises:
        UsageError, RefusedError, NotFoundError: the snapshot cannot be had in that form.
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
