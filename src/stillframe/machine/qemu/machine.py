"""A running stock QEMU as a machine."""

from __future__ import annotations

from collections.abc import Mapping

from stillframe.machine import Hindrance, Mode
from stillframe.machine.outside.machine import OutsideMachine
from stillframe.machine.outside.vm_info import VmInfo
from stillframe.machine.qemu.preflight import preflight
from stillframe.machine.qemu.ramblocks import QemuRamTable
from stillframe.qmp.client import QmpClient


class QemuMachine(OutsideMachine):
    """A connection to one QEMU: its monitor, and its process. Made by ``running.connect``."""

    def __init__(self, info: VmInfo, qmp: QmpClient) -> None:
        """Prepare; the guest is not touched.

        Raises:
            HostError: the process's memory may not be read. MachineError: the process is gone.
        """
        self._ram_list = QemuRamTable(info.pid, qmp)
        super().__init__(info, qmp, self._ram_list)

    def accelerator(self) -> str:
        """``kvm``, ``tcg``, or what the command line asked for."""
        reply = self.qmp.execute("query-kvm")
        if isinstance(reply, Mapping) and reply.get("enabled") is True:
            return "kvm"
        return self.info.accelerator

    def preflight(self, mode: Mode = "background") -> list[Hindrance]:
        """Everything that stands in the way of a snapshot now. The guest is not touched.

        Raises:
            MachineError: the monitor or the process went away. HostError: not permitted.
            RefusedError: the RAM blocks cannot be told for certain.
        """
        return preflight(self.info, self.qmp, self._ram_list, mode)
