"""A running VM of another process as a machine: what a QEMU and a board have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

from stillframe.errors import MachineError
from stillframe.kernel.proc_maps import proc_error
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.machine import Blocker, Mode, Moment
from stillframe.machine.process.attach import check_right, open_userfaultfd
from stillframe.machine.process.device_state import DeviceStateSaver
from stillframe.machine.process.host_cpu import cpu_ties, host_cpu
from stillframe.machine.process.memory_map import read_memory_map
from stillframe.machine.process.ram_mappings import RamTable, Signature
from stillframe.machine.process.resume import process_alive, resume_at_all_costs, start_time
from stillframe.machine.process.stuck_io import unanswered_stop
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.process.watch import MonitorWatch
from stillframe.model import DiskRecord, GpaRange, MachineRecord, RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import Command, QmpCommandError
from stillframe.qmp.replies import as_list, as_map

_STOP_TIMEOUT_S = 10.0
"""Stopping drains and flushes the guest's disks. Only the disks themselves can end that."""
_CONT_TIMEOUT_S = 60.0
_STATUS_TIMEOUT_S = 5.0


class ProcessMachine(ABC):
    """A connection to one VM: its monitor, and its process. Made by ``finding.connect``."""

    user_mode_only_ok: ClassVar[bool] = False
    """Whether the VMM tolerates system calls that fail because they write into protected RAM."""
    managed_by: ClassVar[str] = ""
    """The manager that keeps its own record of the VM's disks, so that we may not change them
    unknown to it."""
    without_userfaultfd: ClassVar[str | None] = None
    """What the user can do where no userfaultfd for the VM is permitted."""

    def __init__(self, info: VmInfo, qmp: QmpClient, table: RamTable) -> None:
        self.info = info
        self.qmp = qmp
        self._table = table
        self._saver = DeviceStateSaver(qmp, info.pid)
        self._start_time = start_time(info.pid)
        self._stop_unanswered: MachineError | None = None

    # What differs between the kinds

    @abstractmethod
    def accelerator(self) -> str:
        """Return what runs the guest: ``kvm``, ``tcg``, ``unicorn``, ...

        Raises:
            MachineError: the monitor went away.
        """

    @abstractmethod
    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Return everything that blocks a snapshot now. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
            RefusedError: the RAM blocks cannot be determined for certain.
        """

    # What is the same

    @property
    def pid(self) -> int:
        """The VM's process."""
        return self.info.pid

    @property
    def lock_name(self) -> str:
        """Its pid and start time, which tells the process from a later one with the same pid."""
        return f"{self.pid}-{self._start_time}"

    @property
    def version(self) -> str:
        """The VMM's version, from its monitor's greeting."""
        return ".".join(str(number) for number in self.qmp.version)

    def monitor_fd(self) -> int:
        """Return the QMP socket's descriptor, for the guard process to share."""
        return self.qmp.fileno()

    def open_write_protection(self) -> Userfaultfd:
        """See ``attach.open_userfaultfd``. The guest is not touched."""
        return open_userfaultfd(
            self.pid,
            self.qmp,
            user_mode_only_ok=self.user_mode_only_ok,
            remedy=self.without_userfaultfd,
        )

    def check_right(self) -> None:
        """See ``attach.check_right``. The process is not touched."""
        check_right(
            self.pid,
            self.qmp,
            user_mode_only_ok=self.user_mode_only_ok,
            remedy=self.without_userfaultfd,
        )

    def process_alive(self) -> bool:
        """Return whether the VM's process still runs (and is no zombie)."""
        return process_alive(self.pid, self._start_time)

    def resume_at_all_costs(self) -> None:
        """See ``resume.resume_at_all_costs``. A paused guest runs afterwards.

        Raises:
            MachineError: the VM did not answer, or has not even answered ``stop``: then the guard
                continues it once it has.
        """
        if self._stop_unanswered is not None:
            raise self._stop_unanswered
        resume_at_all_costs(self.qmp, (self.qmp.address, *self.info.qmp_addresses))

    def describe(self) -> MachineRecord:
        """Return a record of the VM, enough to start it again. The guest is not touched.

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
            host_cpu=host_cpu(),
            cpu_ties=cpu_ties(
                as_list(as_map(self.qmp.execute("query-migrate")).get("blocked-reasons")),
                self.info.argv,
            ),
        )

    def machine_type(self) -> str:
        """Return the machine class's full versioned name, such as ``pc-q35-7.2`` (never the alias).

        The stream's configuration section holds it (QEMU ``migration/savevm.c``:
        vmstate_configuration).

        Raises:
            MachineError: the monitor went away, or does not know it.
        """
        kind = self.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        if not isinstance(kind, str) or not kind:
            raise MachineError("the VM does not tell its machine type", guest_state="unknown")
        return kind.removesuffix("-machine")

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Return where the guest sees these blocks now. The guest is not touched.

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
        """Return all migratable RAM blocks in the VMM's order; see ``RamTable.read``."""
        return self._table.read()

    def blocks_signature(self) -> Signature:
        """See ``RamTable.signature``. The guest is not touched."""
        return self._table.signature()

    def status(self) -> str:
        """Return the run state (QEMU ``qapi/run-state.json``: RunState). The guest is not touched.

        Raises:
            MachineError: the monitor went away.
        """
        reply = self.qmp.execute("query-status", timeout_s=_STATUS_TIMEOUT_S)
        return str(reply.get("status")) if isinstance(reply, Mapping) else "unknown"

    def stop(self) -> None:
        """Stop the vCPUs; the VMM drains and flushes all disks. The guest is paused afterwards.

        A guest that did not run stays as it was.

        Raises:
            MachineError: the monitor went away, or the disks hold up the answer: the guest stays
                paused until they answer, and the monitor is closed.
        """
        try:
            self.qmp.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        except QmpCommandError:
            raise
        except MachineError as error:
            if not self.qmp.alive:
                raise
            self._stop_unanswered = unanswered_stop(self.pid, _STOP_TIMEOUT_S)
            self.qmp.close()  # the VM would answer nothing else; the guard has the socket, too
            raise self._stop_unanswered from error
        # The VMM reads the save command while the caller protects RAM.
        self._saver.announce()

    def announce_cont(self) -> None:
        """Have the VMM read all of ``cont`` but its end ahead of time. The guest stays stopped.

        Raises:
            MachineError: the monitor went away (state unknown).
        """
        self.qmp.announce("cont")

    def cont(self) -> None:
        """Continue a stopped guest; it runs afterwards.

        Raises:
            QmpCommandError: the VMM cannot continue it (a reset is needed, a disk is gone); the
                guest stays paused. MachineError: the monitor went away (state unknown).
        """
        self.qmp.execute("cont", timeout_s=_CONT_TIMEOUT_S)

    def prepare_device_state(self) -> None:
        """See ``DeviceStateSaver.prepare``. The guest is not touched."""
        self._saver.prepare()

    def save_device_state(self, then: Command | None = None) -> bytes:
        """See ``DeviceStateSaver.save``. A paused guest is paused afterwards."""
        return self._saver.save(then)

    def finish_device_state(self) -> None:
        """See ``DeviceStateSaver.finish``. The guest is not touched."""
        self._saver.finish()

    def watch(self) -> MonitorWatch:
        """Start to collect events. The guest is not touched."""
        return MonitorWatch(self.qmp)

    def close(self) -> None:
        """Release monitor and process; never raises. The guest stays as it is."""
        self._saver.finish()
        self._table.close()
        self.qmp.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
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
