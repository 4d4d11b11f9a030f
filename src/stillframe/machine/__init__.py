"""Machines: what can be snapshotted. This module states the contract that each kind fulfils.

``machine.qemu`` is a running stock QEMU; ``board`` is our own VM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from stillframe.capture.write_protection import WriteProtection
from stillframe.model import GpaRange, MachineRecord, RamBlock
from stillframe.qmp.command import Command

Mode = Literal["background", "stop"]
"""How to take a snapshot: in the background, or with the VM stopped throughout."""

Moment = Literal["first", "stop", "saved"]
"""When the pre-flight runs: before anything is done; right before the stop, for what would kill the
VM or keep it from continuing; and once RAM is saved, for what can have written it unseen. Other
programs use the VM meanwhile."""


class Blocker(msgspec.Struct, frozen=True, kw_only=True):
    """Something about a VM that blocks a snapshot (invariant 7).

    ``name``: short and stable, such as ``vfio``. ``reason``: what was found and why it matters.
    ``remedy``: what to do about it. ``severity``: ``refuse`` if a snapshot could be wrong or the
    guest harmed, ``busy`` if so only while some other operation runs, ``warn`` if the problem will
    be noticed in time or is merely worth knowing.
    """

    name: str
    reason: str
    remedy: str
    severity: Literal["refuse", "busy", "warn"]


class MachineEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that the machine reported while it was watched.

    ``received_s``: our monotonic clock (``time.monotonic``), seconds.
    """

    name: str
    data: dict[str, object]
    received_s: float


class Watch(Protocol):
    """A collector of a machine's events, from its creation to ``close``."""

    def seen(self) -> list[MachineEvent]:
        """Return the events so far that matter to a snapshot, oldest first."""

    def close(self) -> None:
        """Stop watching; never raises."""


class Machine(Protocol):
    """A machine that can be snapshotted. All methods but ``close`` may raise MachineError.

    Never call a method from the thread that serves faults: the machine may not answer until a fault
    is served.
    """

    @property
    def pid(self) -> int:
        """The process whose address space holds the guest's RAM."""

    @property
    def lock_name(self) -> str:
        """A name for this VM, unique on the host among present and later VMs, so that only one
        snapshot of it is taken at a time."""

    def monitor_fd(self) -> int | None:
        """Return the descriptor of the connected QMP socket, for the guard process to share; None
        for a machine of this process, which needs no guard to continue it if we die."""

    def open_write_protection(self) -> WriteProtection:
        """Return what write-protects the machine's RAM: a userfaultfd of its process that only we
        hold, or an equivalent for a machine of this process. The guest is not touched.

        Raises:
            HostError: a kernel feature or permission is missing. RefusedError: seccomp.
        """

    def process_alive(self) -> bool:
        """Return whether the machine's process still runs."""

    def resume_at_all_costs(self) -> None:
        """Continue the guest if it is paused, but not if it stopped by itself (an I/O error, a
        panic); reconnect if the monitor was lost. For clean-up after errors.

        Raises:
            MachineError: the machine did not answer; ``guest_state`` is ``unknown``.
        """

    def describe(self) -> MachineRecord:
        """Return a record of the machine, enough to start it again. The guest is not touched."""

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Return everything that blocks a snapshot now, refusals first. The guest is not
        touched."""

    def ram_blocks(self) -> list[RamBlock]:
        """Return all migratable RAM blocks, in the machine's own order. The guest is not
        touched."""

    def blocks_signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Return a value that equals an earlier one as long as no block appeared, vanished, moved
        or was resized.

        Cheap. The guest is not touched.
        """

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Return where the guest sees its RAM now, ascending by guest-physical address."""

    def status(self) -> str:
        """Return the run state in QEMU's words: ``running``, ``paused``, ..."""

    def stop(self) -> None:
        """Stop the vCPUs, and drain and flush the disks. The guest is paused afterwards; a
        suspended guest is suspended again after ``cont``."""

    def announce_cont(self) -> None:
        """Announce that ``cont`` is the next command, so that the machine can prepare for it while
        the caller works. The guest stays paused."""

    def cont(self) -> None:
        """Continue the guest. It runs afterwards."""

    def prepare_device_state(self) -> None:
        """Do the slow preparations for saving, before the downtime. The guest is not touched."""

    def save_device_state(self, then: Command | None = None) -> bytes:
        """Return the state of everything but RAM, as a stream: header, FULL sections, EOF, and the
        vmdescription if the machine has one. ``then``: the likely next command of its monitor.

        Call it while the guest is paused; it is paused afterwards.
        """

    def finish_device_state(self) -> None:
        """Undo ``prepare_device_state``; never raises. The guest is not touched."""

    def watch(self) -> Watch:
        """Start to collect the events that matter to a snapshot."""

    def close(self) -> None:
        """Release the machine; never raises. The guest stays as it is."""
