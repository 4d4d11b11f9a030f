"""The identity of clones, as seen from inside; notes say what was renewed, and what was not.

Clones are the same to the byte. Each gets its own vmgenid (``devices``), ports and places. If the
guest's agent answers, it sets the clock and stirs the guest's random numbers. The rest is up to the
guest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from stillframe.errors import DataError, RefusedError, StillframeError
from stillframe.restore.agents import AT_ONCE, agent_of
from stillframe.restore.networks import shared_networks
from stillframe.restore.option import split_options
from stillframe.restore.restored import RestoredVm, write_vm

_ANSWER_S = 2.0
_ENTROPY_BYTES = 64
_SAME = "the same in all clones: host name, machine id, SSH keys, MAC addresses"


def renew(vms: Sequence[RestoredVm]) -> list[RestoredVm]:
    """Have the agents of running clones renew what they can; notes say what was, and what was not.

    Takes two seconds if agents do not answer, for all at once. Never raises.
    """
    with ThreadPoolExecutor(min(AT_ONCE, len(vms)), "stillframe-identity") as pool:
        return [
            msgspec.structs.replace(vm, notes=(*vm.notes, *notes))
            for vm, notes in zip(vms, pool.map(_renew, vms), strict=True)
        ]


def keep_renewed(vms: Sequence[RestoredVm]) -> list[RestoredVm]:
    """As :func:`renew`; write the notes to the VMs' records, too."""
    renewed = renew(vms)
    for vm in renewed:
        with contextlib.suppress(OSError):  # ended by now, and swept
            write_vm(vm)
    return renewed


def _renew(vm: RestoredVm) -> tuple[str, ...]:
    return (*_devices(vm), _by_agent(vm), _SAME)


def _devices(vm: RestoredVm) -> list[str]:
    options = split_options(vm.argv[1:], DataError)
    kinds = [option.value for option in options if option.name == "device"]
    notes = []
    if any("vmgenid" in kind for kind in kinds):
        notes.append("vmgenid: each has a new one, at which a guest that knows it stirs its random"
                     " numbers")  # fmt: skip
    else:
        notes.append("no vmgenid: nothing tells the guests that they are clones")
    if any("virtio-rng" in kind for kind in kinds):
        notes.append("virtio-rng: gives each other random numbers from now on, when it asks")
    notes += [
        f"the network {name} is your own: the guests have one MAC address, change it inside first"
        for name in shared_networks(options)
    ]
    return notes


def _by_agent(vm: RestoredVm) -> str:
    if vm.state != "running":
        return "guest agent: not asked, since the guest is paused"
    done: list[str] = []
    try:
        with agent_of(vm, answer_s=_ANSWER_S) as agent:
            agent.set_time(time.time_ns())
            done.append("it set the clock")
            agent.write_file("/dev/urandom", os.urandom(_ENTROPY_BYTES))
            done.append("it stirred the random numbers")
    except StillframeError as error:
        # Without the remedy, which is meant for a take.
        why = error.why if isinstance(error, RefusedError) else f"{error.what}: {error.why}"
        if not done:
            return f"guest agent: clock and random numbers are the instant's: {why}"
        done.append(f"then: {why}")
    return f"guest agent: {', '.join(done)}"
