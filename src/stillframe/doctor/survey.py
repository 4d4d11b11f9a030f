"""All running VMs at a glance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec

from stillframe.errors import HostError, RefusedError, StillframeError
from stillframe.machine.outside.machine import OutsideMachine
from stillframe.machine.outside.vm_info import VmInfo, Vmm
from stillframe.machine.running import connect_to, list_vms
from stillframe.qmp.connection import address_text

_TIMEOUT_S = 1.0
_AT_ONCE = 8


class SurveyedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A running VM, and whether a background snapshot of it can be taken.

    ``version``: of its VMM, None if its monitor did not answer.
    ``snapshotable``: None if it cannot be told, for instance because its monitor is busy.
    ``reasons``: why not, or why it cannot be told.
    """

    pid: int
    name: str
    uid: int
    vmm: Vmm
    version: str | None
    accelerator: str
    ram_bytes: int
    qmp: tuple[str, ...]
    status: str | None
    snapshotable: bool | None
    reasons: tuple[str, ...] = ()


def survey() -> list[SurveyedVm]:
    """Look at all VMs of the host, several at a time. The guests are not touched."""
    vms = list_vms()
    if not vms:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(vms)), "stillframe-survey") as pool:
        return list(pool.map(_look_at, vms))


def _look_at(vm: VmInfo) -> SurveyedVm:
    seen = SurveyedVm(
        pid=vm.pid,
        name=vm.name,
        uid=vm.uid,
        vmm=vm.vmm,
        version=None,
        accelerator=vm.accelerator,
        ram_bytes=vm.ram_bytes,
        qmp=tuple(address_text(address) for address in vm.qmp_addresses),
        status=None,
        snapshotable=None,
    )
    if not vm.qmp_addresses:
        return msgspec.structs.replace(
            seen, snapshotable=False, reasons=("it has no QMP monitor that can be reached",)
        )
    try:
        with connect_to(vm, timeout_s=_TIMEOUT_S) as machine:
            seen = msgspec.structs.replace(
                seen,
                version=machine.version,
                accelerator=machine.accelerator(),
                status=machine.status(),
            )
            refusals = [h for h in machine.preflight() if h.severity == "refuse"]
            missing = _missing_right(machine)
    except StillframeError as error:
        return msgspec.structs.replace(seen, reasons=(str(error),))
    return msgspec.structs.replace(
        seen,
        snapshotable=not (refusals or missing),
        reasons=(*(f"{h.name}: {h.reason}; {h.remedy}" for h in refusals), *missing),
    )


def _missing_right(machine: OutsideMachine) -> tuple[str, ...]:
    try:
        machine.check_right()
    except (HostError, RefusedError) as error:
        return (str(error),)
    return ()
