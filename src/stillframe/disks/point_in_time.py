"""The disks' part of a snapshot job: what each of its steps does to them.

Everything slow happens before the stop; in the stop, one transaction fixes all disks at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from stillframe.disks import folding
from stillframe.disks.agent_channel import AgentPlace, find_agent
from stillframe.disks.clones import DiskClones, clonable
from stillframe.disks.copied import Step
from stillframe.disks.copies import DiskCopies
from stillframe.disks.drain import DrainForecast
from stillframe.disks.drives import Drive, writable_drives
from stillframe.disks.guest_agent import GuestAgent
from stillframe.disks.images import sync_twice
from stillframe.disks.overlays import DiskOverlays, FoldWill, to_be_frozen
from stillframe.disks.refusals import DISKS, DiskKind, refuse_unfit
from stillframe.disks.targets import TargetDirectory, need_directory
from stillframe.errors import (
    HostError,
    RefusedError,
    SinkError,
    StillframeError,
    UsageError,
    check_choice,
)
from stillframe.machine import Machine
from stillframe.machine.process.machine import ProcessMachine
from stillframe.model import CapturedDisk
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import Command, QmpCommandError
from stillframe.qmp.replies import as_map

DEFAULT_MAX_DRAIN_MS: Final = 100.0


class DiskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The caller's choices about disks.

    ``kind``: ``copy``, ``overlay``, or ``none``: the snapshot records that it has no disks.
    ``directory``: the place for copies and overlays; None: copies beside the snapshot, overlays
    beside their images. ``snapshot``: the snapshot's path, None if it goes to no file.
    ``encrypted``: the snapshot is encrypted; copies are not, so they need a named ``directory``.
    ``max_drain_ms``: longest wait for requests in flight. ``quiesce``: have the guest agent freeze
    the file systems around the instant. ``frozen``: they have been frozen since an earlier instant.

    Raises:
        UsageError: a choice that makes no sense.
    """

    kind: DiskKind = "none"
    directory: str | None = None
    snapshot: str | None = None
    max_drain_ms: float = DEFAULT_MAX_DRAIN_MS
    quiesce: bool = False
    frozen: bool = False
    encrypted: bool = False

    def __post_init__(self) -> None:
        check_choice("disks", self.kind, DISKS)
        if self.max_drain_ms <= 0:
            raise UsageError(f"a drain of at most {self.max_drain_ms:g} ms makes no sense")


class Heir(Protocol):
    """The executor of a last will: the guard process."""

    def leave(
        self, commands: Sequence[Command], agent: str | None, folds: Sequence[FoldWill] = ()
    ) -> None:
        """Leave the commands to run, in order, if we die, the agent to thaw by, and the overlays to
        fold back; this replaces earlier ones."""


class PointInTime:
    """The steps, in order. Call ``undo`` on every path, and ``keep`` before it if the job
    succeeded."""

    def __init__(
        self, qmp: QmpClient, pid: int, options: DiskOptions, heir: Heir, managed_by: str = ""
    ) -> None:
        self._qmp = qmp
        self._managed_by = managed_by
        self._pid = pid
        self._options = options
        self._heir = heir
        self._drives: tuple[Drive, ...] = ()
        self._copies: DiskCopies | None = None
        self._overlays: DiskOverlays | None = None
        self._clones: DiskClones | None = None
        self._agent: GuestAgent | None = None
        self._agent_place: AgentPlace | None = None
        self._actions: list[dict[str, object]] = []
        self._kept = False
        self.words = ""
        """What the job does with the disks, and at what cost."""
        self.without: tuple[str, ...] = ()
        """The disks that the snapshot leaves out."""
        self.quiesced = options.quiesce or options.frozen
        """Whether the guest's file systems are frozen at the instant."""

    def prepare(self) -> None:
        """Examine the disks, refuse unfit ones, and make targets and overlays. The guest is not
        touched.

        Raises:
            RefusedError: a disk cannot be captured at an instant, or is too slow.
            UsageError: copies have no place to go. SinkError: no room. MachineError, HostError.
        """
        options, qmp, pid = self._options, self._qmp, self._pid
        folding.tidy(qmp, pid)
        drives = writable_drives(qmp, pid)
        forecast = DrainForecast(qmp, drives)
        self._drives = drives
        if options.quiesce:
            self._find_agent()
        if options.kind == "none":
            self.without = tuple(drive.label for drive in drives)
            if drives:
                self.words = f"without disks ({', '.join(self.without)})"
        elif drives:
            self._prepare_disks(drives)
        forecast.refuse_slow(options.max_drain_ms)

    def _find_agent(self) -> None:
        place = find_agent(self._qmp, self._pid, self._managed_by)
        status = as_map(self._qmp.execute("query-status")).get("status")
        if status != "running":
            raise RefusedError(
                "the guest cannot freeze its file systems",
                why=f"it is {status}, so its agent does not run",
                remedy="let it go on, or take it without --quiesce",
            )
        self._agent_place = place
        self._agent = GuestAgent(place, self._qmp)

    def _prepare_disks(self, drives: tuple[Drive, ...]) -> None:
        options, qmp, pid = self._options, self._qmp, self._pid
        frozen = _frozen(drives) if options.kind == "overlay" else []
        copied = [d for d in drives if d not in frozen and not d.only_plain]
        left_out = [d.label for d in drives if d not in frozen and d.only_plain]
        refuse_unfit(
            *(qmp, pid, copied, frozen), fd_passing=qmp.passes_fds, managed_by=self._managed_by
        )
        if copied and options.encrypted and options.directory is None:
            raise RefusedError(
                "copies of disks would not be encrypted",
                why=", ".join(drive.label for drive in copied),
                remedy="name an encrypted place with --disks-dir, or say --disks none",
            )
        token = folding.new_token(pid)
        said = []
        if left_out:
            self.without = tuple(left_out)
            said.append(
                f"without {', '.join(left_out)}: a copy of an encrypted disk would hold its plain"
                " text"
            )
        if frozen:
            snapshot = options.snapshot
            beside = str(Path(snapshot).absolute().parent) if snapshot is not None else None
            self._overlays = DiskOverlays(qmp, pid, frozen, options.directory, beside, token)
            self._actions += self._overlays.actions()
            names = ", ".join(drive.label for drive in frozen)
            said.append(
                f"{names} frozen: the VM goes on in an overlay until 'stillframe commit', and must"
                " not be started from the frozen image"
            )
        if copied:
            directory = TargetDirectory(need_directory(self._copy_directory()))
            cloned = [] if self._managed_by else self._prepare_clones(copied, directory, token)
            if cloned:
                names = ", ".join(drive.label for drive in cloned)
                said.append(f"{names} cloned into {directory.path}")
            copied = [drive for drive in copied if drive not in cloned]
        if copied:
            self._copies = DiskCopies(qmp, copied, directory, token)
            self._leave()
            self._copies.prepare()
            self._actions += self._copies.actions()
            names = ", ".join(drive.label for drive in copied)
            size = f"{self._copies.wanted_bytes / (1 << 20):.0f} MiB"
            said.append(f"{names} copied while the guest runs: up to {size} into {directory.path}")
        self._leave()
        self.words = "; ".join(said)

    def _prepare_clones(
        self, drives: Sequence[Drive], directory: TargetDirectory, token: str
    ) -> list[Drive]:
        """Return the drives that can be cloned; the others have to be copied."""
        found = clonable(self._qmp, self._pid, drives, directory)
        if found:
            try:
                self._clones = DiskClones(self._qmp, self._pid, found, directory, token)
            except (SinkError, HostError, QmpCommandError):
                return []  # for instance, QEMU may not open an overlay there
            self._actions += self._clones.actions()
        return found

    def _copy_directory(self) -> str | None:
        options = self._options
        if options.directory is not None or options.snapshot is None:
            return options.directory
        return f"{options.snapshot}.disks"

    def _leave(self, *, thaws: bool = False) -> None:
        commands = self._copies.will() if self._copies is not None else []
        folds = self._clones.wills() if self._clones is not None else []
        thaw, agent = self._thaw() if thaws else ([], None)
        self._heir.leave([*thaw, *commands], agent, folds)

    def _thaw(self) -> tuple[list[Command], str | None]:
        """Return what the heir needs to thaw the guest: a monitor command, or the agent's path."""
        if self._agent_place is None:
            return [], None
        command = self._agent_place.thaw_command
        return ([], self._agent_place.path) if command is None else ([command], None)

    @property
    def planned(self) -> tuple[CapturedDisk, ...]:
        """The disks that the instant will freeze."""
        return self._overlays.planned if self._overlays is not None else ()

    def before_stop(self) -> None:
        """Freeze the guest's file systems if asked to; write back the host's page cache.

        Raises:
            MachineError: the agent failed; ``undo`` thaws.
        """
        if self._agent is not None:
            self._leave(thaws=True)
            self._agent.freeze()
        if self._options.kind != "none":
            overlays = [*(self._overlays.paths if self._overlays is not None else ())]
            overlays += self._clones.overlays if self._clones is not None else ()
            images = [drive.file for drive in self._drives if drive.file and not drive.direct]
            sync_twice([*overlays, *images])

    def command(self) -> Command | None:
        """Return the command that ``in_stop`` will run, for the caller to announce."""
        return ("transaction", {"actions": self._actions}) if self._actions else None

    def in_stop(self) -> None:
        """Fix all disks at once. The guest is paused before and afterwards.

        Raises:
            MachineError: QEMU refused, and fixed no disk; or the monitor went away.
        """
        command = self.command()
        if command is None:
            return
        for part in (self._copies, self._overlays, self._clones):
            if part is not None:
                part.started()
        self._qmp.execute(*command)

    def thaw(self) -> None:
        """Thaw the guest's file systems, now that the guest runs again.

        Raises:
            MachineError: the agent failed; ``undo`` tries again.
        """
        if self._agent is not None:
            self._agent.thaw()
            self._agent.close()
            self._agent = None
            self._leave()

    def after_instant(self) -> None:
        """Start copying at full speed, now that all disks are fixed.

        Raises:
            SinkError: no room. MachineError: the monitor went away.
        """
        if self._clones is not None:
            self._clones.go()
        if self._copies is not None:
            self._copies.go()

    def finish(self, step: Step) -> tuple[CapturedDisk, ...]:
        """Wait for the copies, name them, and return all disks that the snapshot needs.

        Args:
            step: called with the bytes copied and the total; raises to give up.

        Raises:
            SinkError, SnapshotFailed, MachineError: a disk could not be captured.
        """
        options = self._options
        beside = None
        if options.snapshot is not None:
            beside = str(Path(options.snapshot).absolute().parent)
        found: tuple[CapturedDisk, ...] = ()
        for part in (self._clones, self._copies):
            if part is not None:
                part.finish(step)
        self._heir.leave([], None)
        for part in (self._clones, self._copies):
            if part is not None:
                found += part.records(beside, step)
        if self._overlays is not None:
            found += self._overlays.records(beside)
            if options.snapshot is not None:
                self._overlays.pin(options.snapshot, pending=True)
        return found

    def keep(self) -> None:
        """Keep all of it, now that the snapshot has its name; never raises."""
        self._kept = True
        parts = [part for part in (self._copies, self._clones) if part is not None]
        if parts and self._options.directory is None:
            parts[0].directory.remove_all_but(frozenset().union(*(part.paths for part in parts)))
        if self._overlays is not None and self._options.snapshot is not None:
            with contextlib.suppress(StillframeError):
                self._overlays.pin(self._options.snapshot, pending=False)

    def undo(self) -> None:
        """Release everything, and take it back unless it was kept. Never raises."""
        thaw: list[Command] = []
        agent = None
        if self._agent is not None:
            self._agent.close()
            if self._agent.frozen:
                # If the agent does not answer, leave the thaw to the guard, which keeps trying.
                thaw, agent = self._thaw()
        for part in (self._copies, self._clones):
            if part is not None:
                part.close(keep=self._kept)
        if self._overlays is not None and not self._kept:
            self._overlays.undo()
        with contextlib.suppress(StillframeError):
            self._heir.leave(thaw, agent)


class NoDisks:
    """The disks of a machine on which we cannot fix any."""

    words = ""
    without: tuple[str, ...] = ()
    planned: tuple[CapturedDisk, ...] = ()
    quiesced = False

    def prepare(self) -> None:
        """Do nothing, as all the other steps."""

    def command(self) -> Command | None:
        """Return None: there is no command."""

    before_stop = in_stop = thaw = after_instant = keep = undo = prepare

    def finish(self, step: Step) -> tuple[CapturedDisk, ...]:
        """Return no disks."""
        return ()


def _frozen(drives: Sequence[Drive]) -> list[Drive]:
    """Return the drives to freeze: all but firmware variables, which are small and read again at
    each start of the VM, so they are copied."""
    return [drive for drive in drives if not drive.is_flash]


def planned_overlays(machine: ProcessMachine) -> tuple[CapturedDisk, ...]:
    """Return the disks that ``overlay`` would freeze now; the guest is not touched.

    Raises:
        MachineError: the monitor went away.
    """
    return to_be_frozen(machine.pid, _frozen(writable_drives(machine.qmp, machine.pid)))


def why_without_disks(machine: ProcessMachine) -> tuple[str, ...]:
    """Return why disks of a machine cannot be copied now; empty if all can. The guest is not
    touched.

    Raises:
        MachineError: the monitor went away.
    """
    if machine.info.vmm != "qemu":
        return ()
    qmp, pid = machine.qmp, machine.pid
    drives = writable_drives(qmp, pid)
    try:
        refuse_unfit(qmp, pid, drives, [], fd_passing=qmp.passes_fds)
    except RefusedError as error:
        return tuple(f"without disks: {why}; {remedy}" for _, why, remedy in error.reasons)
    return tuple(
        f"without disk {drive.label}: a copy of an encrypted disk would hold its plain text"
        for drive in drives
        if drive.only_plain
    )


Disks = PointInTime | NoDisks


def disks_of(machine: Machine, options: DiskOptions, heir: Heir) -> Disks:
    """Return the disks' part for a machine: for a QEMU, one that fixes them; a board handles its
    own disks.

    Raises:
        RefusedError: quiesce was asked for, but the machine can have no guest agent.
    """
    if isinstance(machine, ProcessMachine) and machine.info.vmm == "qemu":
        return PointInTime(machine.qmp, machine.pid, options, heir, machine.managed_by)
    if options.quiesce:
        raise RefusedError(
            "no-guest-agent", why="only a QEMU can have one", remedy="take it without --quiesce"
        )
    return NoDisks()
