"""A running stock QEMU as a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from stillframe.errors import (
    BusyError,
    MachineError,
    NotFoundError,
    RefusedError,
    StillframeError,
)
from stillframe.machine import Hindrance, Mode
from stillframe.machine.qemu.attach import open_userfaultfd
from stillframe.machine.qemu.device_state import DeviceStateSaver
from stillframe.machine.qemu.evidence import as_list, as_map
from stillframe.machine.qemu.find import find_vm, parse_address, pid_of_monitor
from stillframe.machine.qemu.memory_map import read_memory_map
from stillframe.machine.qemu.preflight import MIGRATION_IDLE, preflight
from stillframe.machine.qemu.proc_maps import proc_error
from stillframe.machine.qemu.processes import VmInfo, read_vm
from stillframe.machine.qemu.ramblocks import RamTable, Signature
from stillframe.machine.qemu.resume import process_alive, resume_at_all_costs, start_time
from stillframe.machine.qemu.watch import QemuWatch
from stillframe.memory.userfaultfd import Userfaultfd
from stillframe.model import DiskRecord, GpaRange, MachineRecord, RamBlock
from stillframe.qmp.client import QmpClient

_STOP_TIMEOUT_S = 60.0
"""Stopping drains and flushes the guest's disks, which may be slow."""


class QemuMachine:
    """A connection to one VM: its monitor, and its process. Made by ``connect``."""

    def __init__(self, info: VmInfo, qmp: QmpClient) -> None:
        self.info = info
        self.qmp = qmp
        self._table = RamTable(info.pid, qmp)
        self._saver = DeviceStateSaver(qmp, info.pid)
        self._start_time = start_time(info.pid)

    @classmethod
    def connect(cls, ref: str, *, timeout_s: float = 5.0) -> QemuMachine:
        """Connect to the VM that ``ref`` names: QMP socket path, host:port, pid or VM name.

        The guest is not touched. The monitor is held until ``close``.

        Raises:
            NotFoundError: no such VM or socket.
            UsageError: the name is ambiguous, or the VM has no monitor.
            BusyError: every monitor of the VM is held by another client.
            HostError: the process's memory may not be read.
            MachineError: the VM does not answer.
        """
        address = parse_address(ref)
        if address is not None:
            qmp = QmpClient.connect(address, timeout_s=timeout_s)
        else:
            qmp = _first_free(find_vm(ref), timeout_s)
        try:
            pid = pid_of_monitor(qmp.address, qmp.socket)
            info = read_vm(pid, any_program=True) if pid is not None else None
            if info is None:
                raise NotFoundError(
                    f"cannot tell which process is behind {ref}",
                    why="it runs on another host, in another namespace, or as another user",
                    remedy="run on the VM's host, as root or the VM's user",
                )
            return cls(info, qmp)
        except BaseException:
            qmp.close()
            raise

    @property
    def pid(self) -> int:
        """The VM's process."""
        return self.info.pid

    @property
    def start_time(self) -> int:
        """When its process started; see ``/proc/PID/stat``."""
        return self._start_time

    def monitor_fd(self) -> int:
        """The QMP socket's descriptor, for the guard process to share."""
        return self.qmp.fileno()

    def open_userfaultfd(self) -> Userfaultfd:
        """See ``attach.open_userfaultfd``. The guest is not touched."""
        return open_userfaultfd(self.pid, self.qmp)

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
            vmm="qemu",
            vmm_version=".".join(str(number) for number in self.qmp.version),
            machine_type=self.machine_type(),
            accelerator=self.accelerator(),
            executable=executable,
            argv=self.info.argv,
            cwd=cwd,
            guest_state=self.status(),
            vcpus=len(cpus) if isinstance(cpus, list) else 0,
            disks=self._disks(),
        )

    def _name(self) -> str:
        reply = self.qmp.execute("query-name")
        name = reply.get("name") if isinstance(reply, Mapping) else None
        return str(name) if name else self.info.name

    def machine_type(self) -> str:
        """The machine class's full versioned name, such as ``pc-q35-7.2`` (never the alias).

        It is what the stream's configuration section holds (QEMU ``migration/savevm.c``:
        vmstate_configuration).
        """
        kind = self.qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        if not isinstance(kind, str) or not kind:
            raise MachineError("the VM does not tell its machine type", guest_state="unknown")
        return kind.removesuffix("-machine")

    def accelerator(self) -> str:
        """``kvm``, ``tcg``, or what the command line asked for."""
        reply = self.qmp.execute("query-kvm")
        if isinstance(reply, Mapping) and reply.get("enabled") is True:
            return "kvm"
        return self.info.accelerator

    def _disks(self) -> tuple[DiskRecord, ...]:
        reply = self.qmp.execute("query-block")
        entries = reply if isinstance(reply, list) else []
        return tuple(_disk(entry) for entry in entries if isinstance(entry, Mapping))

    def preflight(self, mode: Mode = "background") -> list[Hindrance]:
        """Everything that stands in the way of a snapshot now. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
            RefusedError: the RAM blocks cannot be told for certain.
        """
        return preflight(self.info, self.qmp, self._table, mode)

    def ram_blocks(self) -> list[RamBlock]:
        """All migratable RAM blocks in QEMU's order; see ``RamTable.read``. Guest not touched."""
        return self._table.read()

    def blocks_signature(self) -> Signature:
        """See ``RamTable.signature``. The guest is not touched."""
        return self._table.signature()

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Where the guest sees these blocks now. The guest is not touched.

        Raises:
            MachineError: the monitor went away.
        """
        return read_memory_map(self.qmp, blocks)

    def status(self) -> str:
        """The run state (QEMU ``qapi/run-state.json``: RunState). The guest is not touched.

        Raises:
            MachineError: the monitor went away.
        """
        reply = self.qmp.execute("query-status")
        return str(reply.get("status")) if isinstance(reply, Mapping) else "unknown"

    def stop(self) -> None:
        """Stop the vCPUs; QEMU drains and flushes all disks. The guest is paused afterwards.

        A guest that was not running stays as it was.

        Raises:
            MachineError: the monitor went away, or no answer came (guest's state unknown).
        """
        self.qmp.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        # QEMU reads it while the caller protects RAM.
        self._saver.announce()

    def cont(self) -> None:
        """Continue a stopped guest; it runs afterwards.

        Raises:
            QmpCommandError: QEMU will not continue it (a reset is needed, a disk is gone); the
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

    def watch(self) -> QemuWatch:
        """Begin to collect events. The guest is not touched."""
        return QemuWatch(self.qmp)

    def close(self) -> None:
        """Let go of monitor and process; never raises. The guest stays as it is."""
        if self.qmp.alive:
            self._saver.finish()
        self._table.close()
        self.qmp.close()

    def __enter__(self) -> QemuMachine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _first_free(info: VmInfo, timeout_s: float) -> QmpClient:
    """Connect to the first monitor of a VM that lets us in."""
    busy: StillframeError | None = None
    for address in info.qmp_addresses:
        try:
            return QmpClient.connect(address, timeout_s=timeout_s)
        except (BusyError, NotFoundError, MachineError) as error:
            busy = busy if isinstance(busy, BusyError) else error
    if busy is None:
        raise NotFoundError(f"VM {info.name or info.pid} has no QMP monitor")
    raise busy


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
