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
"""How a snapshot is taken: in the background, or with the VM stopped throughout."""

Moment = Literal["first", "stop", "saved"]
"""When the pre-flight is asked: before anything is done; right before the stop, for what would kill
the VM or keep it from going on; and once RAM is saved, for what can have written it unseen. Others
use the VM meanwhile, too."""


class Blocker(msgspec.Struct, frozen=True, kw_only=True):
    """Something about a VM that stands in the way of a snapshot (invariant 7).

    ``name``: short and stable, such as ``vfio``. ``reason``: what was found and why it matters.
    ``remedy``: what to do about it. ``severity``: ``refuse`` if a snapshot could be wrong or the
    guest harmed, ``busy`` if so for as long as something else is under way, ``warn`` if it will be
    noticed in time or is merely worth knowing.
    """

    name: str
    reason: str
    remedy: str
    severity: Literal["refuse", "busy", "warn"]


class MachineEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the machine told of while it was watched.

    ``received_s``: our monotonic clock (``time.monotonic``), seconds.
    """

    name: str
    data: dict[str, object]
    received_s: float


class Watch(Protocol):
    """Collects what happens to a machine from its making to ``close``."""

    def seen(self) -> list[MachineEvent]:
        """The events so far that matter to a snapshot, oldest first."""

    def close(self) -> None:
        """End watching; never raises."""


class Machine(Protocol):
    """A machine that can be snapshotted. All methods but ``close`` may raise MachineError.

    No method may be called by the thread that serves faults: a machine may wait for a fault to be
    served before it answers.
    """

    @property
    def pid(self) -> int:
        """The process whose address space holds the guest's RAM."""

    @property
    def lock_name(self) -> str:
        """Names this VM among all of the host, also later ones, so that one snapshot of it is taken
        at a time."""

    def monitor_fd(self) -> int | None:
        """Descriptor of the connected QMP socket, for the guard process to share; None for a
        machine of this process, which nobody has to let go on if we die."""

    def open_write_protection(self) -> WriteProtection:
        """What protects the machine's RAM: a userfaultfd of its process that only we hold, or for
        a machine of this process what else there is. The guest is not touched.

        Raises:
            HostError: a kernel feature or permission is missing. RefusedError: seccomp.
        """

    def process_alive(self) -> bool:
        """Whether the machine's process still runs."""

    def resume_at_all_costs(self) -> None:
        """Continue the guest if it is paused, and not if it stopped by itself (an I/O error, a
        panic); connect anew if the monitor was lost. For clean-up after errors.

        Raises:
            MachineError: the machine did not answer; ``guest_state`` is ``unknown``.
        """

    def describe(self) -> MachineRecord:
        """What the machine is, enough to start it again. The guest is not touched."""

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Everything that stands in the way of a snapshot now, refusals first. The guest is not
        touched."""

    def ram_blocks(self) -> list[RamBlock]:
        """All migratable RAM blocks, in the machine's own order. The guest is not touched."""

    def blocks_signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Equal to an earlier one as long as no block appeared, vanished, moved or was resized.

        Cheap. The guest is not touched.
        """

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Where the guest sees its RAM now, ascending by guest-physical address."""

    def status(self) -> str:
        """The run state in QEMU's words: ``running``, ``paused``, ..."""

    def stop(self) -> None:
        """Stop the vCPUs, and drain and flush the disks. The guest is paused afterwards; one that
        was suspended is suspended again after ``cont``."""

    def announce_cont(self) -> None:
        """``cont`` is the next command: let what can be done for it be done while the caller works.
        The guest stays paused."""

    def cont(self) -> None:
        """Continue. The guest runs afterwards."""

    def prepare_device_state(self) -> None:
        """Do what saving needs and what takes time, before the downtime. Guest not touched."""

    def save_device_state(self, then: Command | None = None) -> bytes:
        """The state of everything but RAM, as a stream: header, FULL sections, EOF, and the
        vmdescription if the machine has one. ``then``: the likely next command of its monitor.

        Call it while the guest is paused; it is paused afterwards.
        """

    def finish_device_state(self) -> None:
        """Undo ``prepare_device_state``; never raises. The guest is not touched."""

    def watch(self) -> Watch:
        """Begin to collect the events that matter to a snapshot."""

    def close(self) -> None:
        """Let go of the machine; never raises. The guest stays as it is."""
