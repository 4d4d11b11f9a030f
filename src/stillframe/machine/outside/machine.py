"""A running VM of another process as a machine: what a QEMU and a board have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from stillframe.errors import BusyError, MachineError, RefusedError
from stillframe.machine import Hindrance, Mode
from stillframe.machine.outside.attach import check_right, open_userfaultfd
from stillframe.machine.outside.device_state import DeviceStateSaver
from stillframe.machine.outside.evidence import as_list, as_map
from stillframe.machine.outside.memory_map import read_memory_map
from stillframe.machine.outside.preflight import MIGRATION_IDLE
from stillframe.machine.outside.proc_maps import proc_error
from stillframe.machine.outside.ram_mappings import RamTable, Signature
from stillframe.machine.outside.resume import process_alive, resume_at_all_costs, start_time
from stillframe.machine.outside.vm_info import VmInfo
from stillframe.machine.outside.watch import MonitorWatch
from stillframe.memory.userfaultfd import Userfaultfd
from stillframe.model import DiskRecord, GpaRange, MachineRecord, RamBlock
from stillframe.qmp.client import QmpClient

_STOP_TIMEOUT_S = 60.0
"""Stopping drains and flushes the guest's disks, which may be slow."""


class OutsideMachine(ABC):
    """A connection to one VM: its monitor, and its process. Made by ``running.connect``."""

    serves_its_own_calls: ClassVar[bool] = False
    """Whether the VMM copes with system calls that write into protected RAM and fail."""
    without_userfaultfd: ClassVar[str | None] = None
    """What its user can do where nobody may make a userfaultfd for it."""

    def __init__(self, info: VmInfo, qmp: QmpClient, table: RamTable) -> None:
        self.info = info
        self.qmp = qmp
        self._table = table
        self._saver = DeviceStateSaver(qmp, info.pid)
        self._start_time = start_time(info.pid)

    # What differs between the kinds

    @abstractmethod
    def accelerator(self) -> str:
        """What runs the guest: ``kvm``, ``tcg``, ``unicorn``, ...

        Raises:
            MachineError: the monitor went away.
        """

    @abstractmethod
    def preflight(self, mode: Mode = "background") -> list[Hindrance]:
        """Everything that stands in the way of a snapshot now. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
            RefusedError: the RAM blocks cannot be told for certain.
        """

    # What is the same

    @property
    def pid(self) -> int:
        """The VM's process."""
        return self.info.pid

    @property
    def start_time(self) -> int:
        """When its process started; see ``/proc/PID/stat``."""
        return self._start_time

    @property
    def version(self) -> str:
        """The VMM's version, as its monitor's greeting told."""
        return ".".join(str(number) for number in self.qmp.version)

    def monitor_fd(self) -> int:
        """The QMP socket's descriptor, for the guard process to share."""
        return self.qmp.fileno()

    def open_userfaultfd(self) -> Userfaultfd:
        """See ``attach.open_userfaultfd``. The guest is not touched."""
        return open_userfaultfd(
            self.pid,
            self.qmp,
            user_mode_will_do=self.serves_its_own_calls,
            remedy=self.without_userfaultfd,
        )

    def check_right(self) -> None:
        """See ``attach.check_right``. The process is not touched."""
        check_right(
            self.pid,
            self.qmp,
            user_mode_will_do=self.serves_its_own_calls,
            remedy=self.without_userfaultfd,
        )

    def process_alive(self) -> bool:
        """Whether the VM's process still runs (and is no zombie)."""
        return process_alive(self.pid, self.start_time)

    def resume_at_all_costs(self) -> None:
        """See ``resume.resume_at_all_costs``. The guest runs afterwards."""
        resume_at_all_costs(self.qmp, (self.qmp.address, *self.info.qmp_addresses))

    def describe(self) -> MachineRecord:
        """What the VM is, enough to start it again. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
        """
        directory = Path(f"/proc/{self.pid}")
        try:
            executable = str((directory / "exe").readlink()).removesuffix(" (deleted)")
            cwd = str((directory / "cwd").readlink())
        except OSError as error:
            raise proc_error(self.pid, "the program's name", error) from error
        cpus = self.qmp.execute("query-cpus-fast")
        return MachineRecord(
            name=self._name(),
            pid=self.pid,
            uid=self.info.uid,
            vmm=self.info.vmm,
            vmm_version=self.version,
            machine_type=self.machine_type(),
            accelerator=self.accelerator(),
            executable=executable,
            argv=self.info.argv,
            cwd=cwd,
            guest_state=self.status(),
            vcpus=len(cpus) if isinstance(cpus, list) else 0,
            disks=self._disks(),
        )

    def machine_type(self) -> str:
        """The machine class's full versioned name, such as ``pc-q35-7.2`` (never the alias).

        It is what the stream's configuration section holds (QEMU ``migration/savevm.c``:
        vmstate_configuration).

        Raises:
            MachineError: the monitor went away, or does not tell.
        """
        kind = self.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        if not isinstance(kind, str) or not kind:
            raise MachineError("the VM does not tell its machine type", guest_state="unknown")
        return kind.removesuffix("-machine")

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Where the guest sees these blocks now. The guest is not touched.

        Raises:
            MachineError: the monitor went away.
        """
        return read_memory_map(self.qmp, blocks)

    def _name(self) -> str:
        reply = self.qmp.execute("query-name")
        name = reply.get("name") if isinstance(reply, Mapping) else None
        return str(name) if name else self.info.name

    def _disks(self) -> tuple[DiskRecord, ...]:
        reply = self.qmp.execute("query-block")
        entries = reply if isinstance(reply, list) else []
        return tuple(_disk(entry) for entry in entries if isinstance(entry, Mapping))

    def ram_blocks(self) -> list[RamBlock]:
        """All migratable RAM blocks in the VMM's order; see ``RamTable.read``."""
        return self._table.read()

    def blocks_signature(self) -> Signature:
        """See ``RamTable.signature``. The guest is not touched."""
        return self._table.signature()

    def status(self) -> str:
        """The run state (QEMU ``qapi/run-state.json``: RunState). The guest is not touched.

        Raises:
            MachineError: the monitor went away.
        """
        reply = self.qmp.execute("query-status")
        return str(reply.get("status")) if isinstance(reply, Mapping) else "unknown"

    def stop(self) -> None:
        """Stop the vCPUs; the VMM drains and flushes all disks. The guest is paused afterwards.

        A guest that was not running stays as it was.

        Raises:
            MachineError: the monitor went away, or no answer came (guest's state unknown).
        """
        self.qmp.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        # The VMM reads it while the caller protects RAM.
        self._saver.announce()

    def cont(self) -> None:
        """Continue a stopped guest; it runs afterwards.

        Raises:
            QmpCommandError: it cannot be continued (a reset is needed, a disk is gone); the
                guest stays paused. MachineError: the monitor went away (state unknown).
        """
        self.qmp.execute("cont", timeout_s=_STOP_TIMEOUT_S)

    def refuse_unsavable(self) -> None:
        """A device that was plugged in since the pre-flight and cannot be migrated: QEMU 7.2 dies
        of SIGSEGV when its state is to be saved. The guest is not touched.

        Raises:
            RefusedError: there is one. BusyError: a migration is under way.
            MachineError: the monitor went away.
        """
        migration = as_map(self.qmp.execute("query-migrate"))
        reasons = as_list(migration.get("blocked-reasons"))
        if reasons:
            raise RefusedError(
                "migration-blocker",
                why=f"the VM's state cannot be saved: {reasons[0]}",
                remedy="remove the device that the reason names",
            )
        if str(migration.get("status")) not in MIGRATION_IDLE:
            raise BusyError(
                "migration-running",
                why=f"a migration of the VM is in state '{migration.get('status')}'",
                remedy="wait for it to end, or cancel it",
                guest_state="running",
            )

    def prepare_device_state(self) -> None:
        """See ``DeviceStateSaver.prepare``. The guest is not touched."""
        self._saver.prepare()

    def save_device_state(self) -> bytes:
        """See ``DeviceStateSaver.save``. A paused guest is paused afterwards."""
        state = self._saver.save()
        self.qmp.announce("cont")
        return state

    def finish_device_state(self) -> None:
        """See ``DeviceStateSaver.finish``. The guest is not touched."""
        self._saver.finish()

    def watch(self) -> MonitorWatch:
        """Begin to collect events. The guest is not touched."""
        return MonitorWatch(self.qmp)

    def close(self) -> None:
        """Let go of monitor and process; never raises. The guest stays as it is."""
        if self.qmp.alive:
            self._saver.finish()
        self._table.close()
        self.qmp.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _disk(entry: Mapping[str, object]) -> DiskRecord:
    inserted = entry.get("inserted")
    medium: Mapping[str, object] = inserted if isinstance(inserted, Mapping) else {}
    image = medium.get("image")
    filename = image.get("filename") if isinstance(image, Mapping) else None
    return DiskRecord(
        device=str(entry.get("device") or ""),
        qdev=str(entry.get("qdev") or ""),
        node_name=str(medium.get("node-name") or ""),
        filename=str(filename or medium.get("file") or ""),
        driver=str(medium.get("drv") or ""),
        read_only=medium.get("ro") is True,
        removable=entry.get("removable") is True,
    )
