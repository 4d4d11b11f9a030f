"""The parts of a restore plan."""

from __future__ import annotations

from typing import Literal

import msgspec

from stillframe.restore.forwarded_ports import Forward

Access = Literal["read", "write", "create", "listen", "connect", "run"]
TouchKind = Literal["file", "program", "socket", "device", "network"]


class Rewrite(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the recorded command line. ``before`` is empty if an option was added,
    ``after`` if one was left out."""

    before: str
    after: str
    reason: str


class Touch(msgspec.Struct, frozen=True, kw_only=True):
    """Something on the host that the restored VM, or its start, uses.

    ``option``: the option that says so. ``required``: the VM cannot start without it.
    """

    kind: TouchKind
    access: Access
    target: str
    option: str
    required: bool = False


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An option that bars the recorded command line from use as it is; ``option`` as recorded."""

    option: str
    reason: str
    remedy: str


class Risk(msgspec.Struct, frozen=True, kw_only=True):
    """Something that only a caller who has read the command line should allow, unless this user
    ran the VM so on this host."""

    option: str
    reason: str


class DiskOverlay(msgspec.Struct, frozen=True, kw_only=True):
    """A new image in place of a recorded disk, so that the disk itself is never written.

    ``base``: path, URL or ``json:{...}``. ``base_format``: empty if it is to be probed.
    ``in_use``: another program may write the base now. ``kind``: ``overlay``, a qcow2 image over
    the base; ``copy``, a raw one with its content. ``captured``: the disk of the snapshot whose
    content the base is; empty for a disk as it is now.
    """

    base: str
    base_format: str
    overlay: str
    in_use: bool
    kind: Literal["overlay", "copy"] = "overlay"
    captured: str = ""


class RunAs(msgspec.Struct, frozen=True, kw_only=True):
    """The user that a restored VM runs as, in place of root, which restores it (credentials(7))."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A memory backend that gets a file. ``block``: its number in the snapshot. ``option``: its
    place on the command line, or None for RAM that QEMU makes itself (``-m``)."""

    block: int
    size_bytes: int
    id: str
    canonical: bool
    option: int | None


class ImagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The image that a VM can run on. ``streamed``: why there is none; then there are no backends.
    ``share``: one VM alone has the image, so it is that VM's RAM. ``readonly``: QEMU may open its
    files for reading only."""

    backends: tuple[Backend, ...] = ()
    streamed: str = ""
    share: bool = True
    readonly: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the image's blocks."""
        return tuple(backend.block for backend in self.backends)


def streamed_note(why: str) -> str:
    """Return the note for a VM that is not on an image."""
    return f"all of RAM came before it ran: {why}"


class RestorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan for starting a snapshot. Nothing has been created or started yet.

    ``argv``: the new command line without the incoming stream, which is a pipe whose number is
    known only at the start (:meth:`argv_with_stream`). ``directory``: to be created for this
    restore, mode 0700. ``machine_type``: versioned name. ``vmm``: what runs it; ``vmm_name``: for
    people. ``incoming_option``: takes the number of the pipe (QEMU ``-incoming fd:N``:
    ``migration/fd.c``). ``environment``: in addition to the caller's. ``distrust``: why the file as
    a whole needs the caller's trust. ``risks``: what in it needs trust if the file is from
    elsewhere; ``taken_here``: it is not from elsewhere. ``run_as``: None for the caller.
    ``clock_shift_ns``: how far to set the guest's RTC back, so that it goes on from the instant.
    ``image``: the part of RAM that will be on an image; the command line names its files only at
    the start (``on_image.put_on_image``). ``complete_image``: the directory of the complete image
    that is used, if there is one.
    ``forwards``: host ports that will be the guest's; their numbers are known only at the start.
    """

    vmm: str = "qemu"
    vmm_name: str = "QEMU"
    incoming_option: str = "-incoming"
    snapshot: str
    name: str
    program: str
    argv: tuple[str, ...]
    recorded: tuple[str, ...]
    cwd: str
    environment: dict[str, str] = {}
    machine_type: str
    recorded_program: str = ""
    directory: str
    disk_directory: str
    qmp_address: str
    log_path: str
    rewrites: tuple[Rewrite, ...]
    touches: tuple[Touch, ...]
    overlays: tuple[DiskOverlay, ...]
    refusals: tuple[Refusal, ...]
    distrust: tuple[str, ...]
    risks: tuple[Risk, ...]
    taken_here: bool
    run_as: RunAs | None = None
    clock_shift_ns: int = 0
    image: ImagePlan = ImagePlan(streamed="its VMM cannot map an image")
    complete_image: str = ""
    notes: tuple[str, ...]
    forwards: tuple[Forward, ...] = ()

    @property
    def needs_trust(self) -> tuple[str, ...]:
        """All that the caller must answer for with --trust."""
        risks = () if self.taken_here else self.risks
        return (*self.distrust, *(f"{risk.option}: {risk.reason}" for risk in risks))

    def argv_with_stream(self, fd: int) -> list[str]:
        """Return the whole command line."""
        return [*self.argv, self.incoming_option, f"fd:{fd}"]
