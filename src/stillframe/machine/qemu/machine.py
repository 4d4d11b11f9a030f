"""A running stock QEMU as a machine."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.machine import Blocker, Mode, Moment
from stillframe.machine.process.inspection import fd_targets
from stillframe.machine.process.machine import ProcessMachine
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu.disks import read_disks
from stillframe.machine.qemu.live_line import live_line
from stillframe.machine.qemu.preflight import preflight
from stillframe.machine.qemu.ramblocks import QemuRamTable
from stillframe.machine.qemu.start_directory import start_directory
from stillframe.model import MachineRecord
from stillframe.qmp.client import QmpClient


class QemuMachine(ProcessMachine):
    """A connection to one QEMU: its monitor, and its process. Made by ``finding.connect``."""

    def __init__(self, info: VmInfo, qmp: QmpClient) -> None:
        """Prepare; the guest is not touched.

        Raises:
            HostError: we may not read the process's memory. MachineError: the process is gone.
        """
        self._ram_list = QemuRamTable(info.pid, qmp)
        super().__init__(info, qmp, self._ram_list)

    def accelerator(self) -> str:
        """Return ``kvm``, ``tcg``, or what the command line asked for."""
        reply = self.qmp.execute("query-kvm")
        if isinstance(reply, Mapping) and reply.get("enabled") is True:
            return "kvm"
        return self.info.accelerator

    def describe(self) -> MachineRecord:
        """Return a record of the VM, with everything plugged, unplugged and changed since its
        start.

        The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
        """
        record = super().describe()
        directory = start_directory(self.pid, self.info.argv)
        disks = read_disks(self.qmp, fd_targets(self.pid))
        line = live_line(self.qmp, self.info.argv, directory, disks)
        return msgspec.structs.replace(
            record,
            cwd=str(directory),
            disks=disks,
            command_line=line.words if line.words != record.argv else (),
            config_files=line.files,
            differences=line.differences,
        )

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Return everything that blocks a snapshot now. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
            RefusedError: the RAM blocks cannot be determined for certain.
        """
        return preflight(self.info, self.qmp, self._ram_list, mode, moment)
