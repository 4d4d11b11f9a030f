"""What a restore plan is made of."""

from __future__ import annotations

from typing import Literal

import msgspec

from stillframe.machine.outside.vm_info import Vmm

Access = Literal["read", "write", "create", "listen", "connect", "run"]
TouchKind = Literal["file", "program", "socket", "device", "network"]


class Rewrite(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the recorded command line. ``before`` or ``after`` is empty where there is
    none: an option was added or left out."""

    before: str
    after: str
    reason: str


class Touch(msgspec.Struct, frozen=True, kw_only=True):
    """Something of the host that the restored VM, or its start, uses.

    ``option``: what says so. ``required``: the VM cannot start without it.
    """

    kind: TouchKind
    access: Access
    target: str
    option: str
    required: bool = False


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why the recorded command line cannot be used as it is; ``option`` as recorded."""

    option: str
    reason: str
    remedy: str


class Risk(msgspec.Struct, frozen=True, kw_only=True):
    """Something that only a caller who has read the command line should allow."""

    option: str
    reason: str


class DiskOverlay(msgspec.Struct, frozen=True, kw_only=True):
    """A new image in place of a recorded disk, so that the disk itself is never written.

    ``base``: path or URL. ``base_format``: empty if it is to be probed.
    ``in_use``: another program may write the base now. ``kind``: ``overlay``, a qcow2 image over
    the base; ``copy``, a raw one with its content.
    """

    base: str
    base_format: str
    overlay: str
    in_use: bool
    kind: Literal["overlay", "copy"] = "overlay"


class RestorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a snapshot would be started. Nothing has been made or started yet.

    ``argv``: the new command line without the incoming stream, which is a pipe whose number is
    known at the start only (:meth:`argv_with_stream`). ``directory``: made for this restore,
    mode 0700. ``machine_type``: versioned name. ``vmm``: what runs it.
    """

    vmm: Vmm = "qemu"
    snapshot: str
    name: str
    program: str
    argv: tuple[str, ...]
    recorded: tuple[str, ...]
    cwd: str
    machine_type: str
    directory: str
    disk_directory: str
    qmp_address: str
    log_path: str
    rewrites: tuple[Rewrite, ...]
    touches: tuple[Touch, ...]
    overlays: tuple[DiskOverlay, ...]
    refusals: tuple[Refusal, ...]
    distrust: str
    risks: tuple[Risk, ...]
    notes: tuple[str, ...]

    @property
    def vmm_name(self) -> str:
        """What runs it, as people call it."""
        return "QEMU" if self.vmm == "qemu" else "the board"

    @property
    def incoming_option(self) -> str:
        """What the number of the pipe is given by (QEMU ``-incoming fd:N``: ``migration/fd.c``)."""
        return "-incoming" if self.vmm == "qemu" else "--incoming"

    def argv_with_stream(self, fd: int) -> list[str]:
        """The whole command line."""
        return [*self.argv, self.incoming_option, f"fd:{fd}"]
