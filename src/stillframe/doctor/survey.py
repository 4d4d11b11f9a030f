"""All running VMs at a glance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from stillframe.disks.point_in_time import why_without_disks
from stillframe.doctor.checks import BEING_FILLED, is_of_filler
from stillframe.errors import HostError, RefusedError, StillframeError
from stillframe.machine.finding import connect_to, list_vms
from stillframe.machine.process.machine import ProcessMachine
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu.processes import human_monitors
from stillframe.qmp.connection import QMP_OPTION, address_text
from stillframe.restore.forwarded_ports import Forward
from stillframe.restore.restored import RestoredVm, adopt_orphans, list_restored

_TIMEOUT_S = 1.0
_AT_ONCE = 8


class SurveyedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A running VM, and whether a background snapshot of it can be taken.

    ``version``: its VMM's, None if the monitor did not answer. ``snapshotable``: None if unknown,
    for instance because the monitor is busy. ``without_disks``: a snapshot must leave its disks
    out. ``reasons``: why it cannot be snapshotted, why its disks are left out, or why that is
    unknown. ``forwards``: ports of this host that lead to its guest.

    Only for a VM that we started: ``restored_from``: the snapshot, or the VM that it is a clone of;
    ``resident``: the share of its RAM's image that is filled, 0 to 1; ``resident_ms``: how long
    after the restore began the image was complete.
    """

    pid: int
    name: str
    uid: int
    vmm: str
    version: str | None
    accelerator: str
    ram_bytes: int
    qmp: tuple[str, ...]
    status: str | None
    snapshotable: bool | None
    without_disks: bool = False
    reasons: tuple[str, ...] = ()
    restored_from: str | None = None
    resident: float | None = None
    resident_ms: float | None = None
    forwards: tuple[Forward, ...] = ()


def survey() -> list[SurveyedVm]:
    """Look at all VMs of the host, several at a time. The guests are not touched.

    If the filler of a restored VM's image has died, this call starts another one.
    """
    vms = list_vms()
    if not vms:
        return []
    stuck = adopt_orphans()
    ours = {vm.pid: vm for vm in list_restored()}
    with ThreadPoolExecutor(min(_AT_ONCE, len(vms)), "stillframe-survey") as pool:
        return [_with_origin(seen, ours, stuck) for seen in pool.map(_look_at, vms)]


def _with_origin(
    seen: SurveyedVm, ours: Mapping[int, RestoredVm], stuck: Mapping[int, StillframeError]
) -> SurveyedVm:
    origin = ours.get(seen.pid)
    if origin is None:
        return seen
    why = [f"its image is not being filled: {stuck[seen.pid]}"] if seen.pid in stuck else []
    if not why and origin.is_being_filled:
        seen, why = _while_filled(seen), [BEING_FILLED]
    return msgspec.structs.replace(
        seen,
        restored_from=origin.snapshot or origin.parent,
        forwards=origin.forwards,
        resident=origin.resident(),
        resident_ms=origin.filled_ms(),
        reasons=(*seen.reasons, *why),
    )


def _while_filled(seen: SurveyedVm) -> SurveyedVm:
    """Drop the refusals that only the filler causes: a take waits until it is done."""
    others = tuple(reason for reason in seen.reasons if not is_of_filler(reason.partition(":")[0]))
    can = True if seen.snapshotable is False and not others else seen.snapshotable
    return msgspec.structs.replace(seen, snapshotable=can, reasons=others)


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
    monitors = [] if vm.qmp_addresses else human_monitors(vm)
    if monitor := next((path for path in monitors if os.access(path, os.W_OK)), None):
        return msgspec.structs.replace(
            seen,
            snapshotable=True,
            without_disks=True,
            reasons=(
                f"it has a monitor for people only, {monitor}: 'stillframe take' has QEMU save"
                f" it, without disks; for all else start it with {QMP_OPTION}",
            ),
        )
    if not vm.qmp_addresses:
        return msgspec.structs.replace(
            seen,
            snapshotable=False,
            reasons=(f"it has no QMP monitor that can be reached; start it with {QMP_OPTION}",),
        )
    try:
        with connect_to(vm, timeout_s=_TIMEOUT_S) as machine:
            seen = msgspec.structs.replace(
                seen,
                version=machine.version,
                accelerator=machine.accelerator(),
                status=machine.status(),
            )
            refusals = [h for h in machine.preflight() if h.severity != "warn"]
            missing = _missing_right(machine)
            unfit = why_without_disks(machine)
    except StillframeError as error:
        return msgspec.structs.replace(seen, reasons=(str(error),))
    return msgspec.structs.replace(
        seen,
        snapshotable=not (refusals or missing),
        without_disks=bool(unfit),
        reasons=(*(f"{h.name}: {h.reason}; {h.remedy}" for h in refusals), *missing, *unfit),
    )


def _missing_right(machine: ProcessMachine) -> tuple[str, ...]:
    try:
        machine.check_right()
    except (HostError, RefusedError) as error:
        return (str(error),)
    return ()
