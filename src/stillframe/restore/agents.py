"""Guest agents of VMs that were started from a snapshot: they thaw guests that were frozen.

``take --quiesce`` has the agent freeze the guest's file systems around the instant. So a restored
guest is frozen, too: each of its writes waits until its agent, which can only be reached from
outside, has thawed it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from stillframe.disks.agent_channel import THAW, find_agent
from stillframe.disks.guest_agent import GuestAgent
from stillframe.errors import RefusedError, StillframeError
from stillframe.machine.libvirt.machine import open_bridge
from stillframe.qmp.client import QmpClient
from stillframe.restore.restored import RestoredVm, write_vm

_ANSWER_S = 5.0
_THAW_S = 20.0
_PAUSE_S = 0.2
AT_ONCE = 256
"""An agent that does not answer costs a waiting thread; the others need not wait for it."""
_FROZEN = "its file systems are frozen, as they were at the instant (--quiesce)"


@contextlib.contextmanager
def agent_of(vm: RestoredVm, *, answer_s: float, frozen: bool = False) -> Iterator[GuestAgent]:
    """Connect to a running guest's agent.

    Args:
        answer_s: how long it may take to answer. frozen: as of :class:`GuestAgent`.

    Raises:
        RefusedError, BusyError: the guest has no agent, or one that does not answer.
        MachineError, HostError: the VM cannot be asked.
    """
    if vm.domain is None:
        monitor, managed_by = QmpClient.connect(vm.qmp_address, timeout_s=answer_s), ""
    else:
        monitor, managed_by = open_bridge(vm.domain), "libvirt"
    with monitor as qmp:
        place = find_agent(qmp, vm.pid, managed_by)
        agent = GuestAgent(place, qmp, answer_s=answer_s, frozen=frozen)
        with contextlib.closing(agent):
            yield agent


def thaw(vms: Sequence[RestoredVm]) -> list[RestoredVm]:
    """Have the agents of guests that were frozen at the instant thaw them. Where that fails, the
    notes of the VM and of its record say so. Never raises.

    Takes about twenty seconds if agents do not answer, for all at once.
    """
    with ThreadPoolExecutor(min(AT_ONCE, len(vms)), "stillframe-thaw") as pool:
        notes = list(pool.map(_thaw, vms))
    thawed = [
        msgspec.structs.replace(vm, notes=(*vm.notes, note), frozen=True) if note else vm
        for vm, note in zip(vms, notes, strict=True)
    ]
    for vm in thawed:
        with contextlib.suppress(OSError):  # ended by now, and swept
            write_vm(vm)
    return thawed


def _thaw(vm: RestoredVm) -> str:
    """Thaw one guest; return a note if that fails, or an empty text."""
    if vm.state != "running":
        return f"{_FROZEN}: have its guest agent thaw them once it runs ({THAW})"
    deadline_s = time.monotonic() + _THAW_S
    while True:
        try:
            with agent_of(vm, answer_s=_ANSWER_S, frozen=True) as agent:
                agent.thaw()
                return ""
        except StillframeError as error:
            # Under libvirt, or while the guest waits for pages, the agent takes a while to appear.
            # A missing channel, or one that accepts no connection, stays as it is.
            is_final = isinstance(error, RefusedError) and error.what != "guest-agent-silent"
            is_late = time.monotonic() > deadline_s
            if (is_final and vm.domain is None) or is_late or not vm.is_running:
                why = error.why or error
                return f"{_FROZEN}, and its guest agent does not thaw them ({THAW}): {why}"
        time.sleep(_PAUSE_S)
