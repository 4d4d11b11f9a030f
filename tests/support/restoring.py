"""Small VMs without a guest, taken and restored, in one directory."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from guests.monitor import qmp_execute
from guests.qemu import qemu_binary
from stillframe import api
from stillframe.model import MachineRecord
from stillframe.restore.start import RestoredVm, restore
from stillframe.still.host_mark import HostKey
from stillframe.still.writer import SnapshotWriter
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.bare_vm import BareVm
from tests.support.taking import PATIENT_MS

SMALL = ("-nodefaults", "-M", "q35", "-m", "16")


class Restores:
    """Takes and restores; what it started ends with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pids: list[int] = []

    def taken(
        self, *arguments: str, name: str = "x.still", disks: api.DiskKind = "copy", **options: Any
    ) -> Path:
        """A snapshot of a QEMU that was started so, and that has ended."""
        with BareVm(*arguments, **options) as vm:
            return self.take(vm, name, disks=disks)

    def take(self, vm: BareVm, name: str = "x.still", *, disks: api.DiskKind = "copy") -> Path:
        path = self.directory / name
        api.take(vm.qmp, path, overwrite=True, disks=disks, max_drain_ms=PATIENT_MS).wait(60)
        return path

    def restore(self, path: Path, *extra: str, **options: Any) -> RestoredVm:
        number = len(list(self.directory.glob("vm*")))
        values: dict[str, Any] = {
            "directory": self.directory / f"vm{number}",
            "program": qemu_binary(),
            "extra_args": extra,
        }
        vm = restore(path, **(values | options))
        self._pids.append(vm.pid)
        return vm

    def close(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def hmp(vm: RestoredVm | BareVm, command: str) -> str:
    """The answer of the human monitor."""
    address = vm.qmp_address if isinstance(vm, RestoredVm) else vm.qmp
    return str(qmp_execute(Path(address), "human-monitor-command", {"command-line": command}))


def edited(
    path: Path,
    to: Path,
    *,
    here: bool = False,
    key: HostKey | None = None,
    argv: Sequence[str] = (),
    replaced: Sequence[str] | None = None,
    **fields: Any,
) -> Path:
    """A copy of a snapshot with another record of the machine, as an attacker makes it.

    Args:
        here: marked as if it had been taken so on this host; ``key``: marked by this one.
        argv: options added at the end. replaced: the whole command line.
        fields: of the machine; ``created`` of the manifest.
    """
    with open_snapshot(path) as opened, SnapshotWriter(LocalSink(to, overwrite=True)) as writer:
        manifest = opened.manifest
        by_frame: dict[int, list[Any]] = {}
        for number in range(len(opened.blocks)):
            for frame, run in opened.index.runs_of_block(number):
                by_frame.setdefault(frame, []).append(run)
        for frame, raw in opened.container.iter_frames(range(opened.index.frame_count)):
            if frame in by_frame:
                runs = sorted(by_frame[frame], key=lambda run: run.raw_offset)
                writer.append(writer.encode(raw), runs)
            else:
                writer.append_stream(raw)
        record = manifest.machine
        assert isinstance(record, MachineRecord)
        created = fields.pop("created", manifest.created)
        line = (*(replaced or record.command_line or record.argv), *argv)
        record = msgspec.structs.replace(record, argv=line, command_line=line)
        record = msgspec.structs.replace(record, **fields)
        new = msgspec.structs.replace(manifest, machine=record, created=created)
        writer.finish(new, key=HostKey.load_or_make() if here else key)
    return to
