"""Snapshot files with a command line of the test's choice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillframe.model import CapturedDisk, DiskRecord, MachineRecord
from stillframe.restore.plan import plan_restore
from stillframe.restore.records import RestorePlan
from stillframe.still.host_mark import HostKey
from stillframe.still.writer import SnapshotWriter
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support_store import small

MACHINE_TYPE = "pc-q35-7.2"
NO_NETWORK = ("-net", "none")
NO_DISPLAY = ("-display", "none")
"""QEMU's own ones reach the host."""


def machine(argv: Sequence[str], **fields: Any) -> MachineRecord:
    """A record of a VM that was started with these options."""
    values: dict[str, Any] = {
        "name": "demo",
        "pid": 1,
        "uid": os.geteuid(),
        "vmm": "qemu",
        "vmm_version": "7.2.0",
        "machine_type": MACHINE_TYPE,
        "accelerator": "tcg",
        "executable": "/usr/bin/qemu-system-x86_64",
        "argv": ("qemu-system-x86_64", *argv),
        "cwd": "/",
        "guest_state": "running",
        "vcpus": 1,
    }
    return MachineRecord(**(values | fields))


def write_snapshot(
    path: Path, record: MachineRecord | None, *, here: bool = False, **fields: Any
) -> Path:
    """A small sound snapshot file.

    ``here``: marked as taken on this host. ``fields``: of the manifest.
    """
    with SnapshotWriter(LocalSink(path, overwrite=True)) as writer:
        writer.append_stream(small.head())
        small.write_ram(writer, small.random_ram(1))
        writer.append_stream(small.tail())
        key = HostKey.load_or_make() if here else None
        writer.finish(small.manifest(machine=record, **fields), key=key)
    return path


class Planner:
    """Plans restores of snapshots with given command lines, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"

    def plan(
        self,
        *argv: str,
        extra: Sequence[str] = (),
        options: Any = None,
        here: bool = False,
        **fields: Any,
    ) -> RestorePlan:
        """``options`` are those of plan_restore, ``fields`` those of the record. The VM has no
        network card and no display but those of its options."""
        record = machine(
            [*argv, *NO_NETWORK, *NO_DISPLAY], **({"cwd": str(self.directory)} | fields)
        )
        return self.plan_record(record, extra=extra, here=here, **(options or {}))

    def plan_record(
        self,
        record: MachineRecord | None,
        *,
        extra: Sequence[str] = (),
        here: bool = False,
        captured: Sequence[CapturedDisk] = (),
        **options: Any,
    ) -> RestorePlan:
        """``here``: taken on this host by this user. ``captured``: the disks that it holds."""
        path = self.directory / "x.still"
        write_snapshot(path, record, here=here, captured_disks=tuple(captured))
        values: dict[str, Any] = {"directory": self.run, "program": "true"}
        with open_snapshot(path) as snapshot:
            return plan_restore(snapshot, extra_args=extra, **(values | options))

    def words(self, *argv: str, **options: Any) -> list[str]:
        """The new options, without those that every plan adds."""
        words = list(self.plan(*argv, **options).argv[1:])
        added = (
            [*NO_NETWORK],
            [*NO_DISPLAY],
            ["-machine", f"type={MACHINE_TYPE}"],
            ["-qmp", f"unix:{self.run}/qmp.sock,server=on,wait=off"],
        )
        for pair in added:
            places = reversed(range(len(words)))
            at = next((n for n in places if words[n : n + 2] == pair), None)
            if at is not None:
                del words[at : at + 2]
        return words


def disk(filename: str, **fields: Any) -> DiskRecord:
    """A disk as the monitor names it."""
    values: dict[str, Any] = {
        "device": "",
        "qdev": "",
        "node_name": "",
        "driver": "qcow2",
        "read_only": False,
    }
    return DiskRecord(filename=filename, **(values | fields))
