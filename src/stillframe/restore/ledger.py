"""The ledger of a restore: what it touches on the host, what was changed, and why.

Anything that it touches outside the restore's own directories is a risk, by the touch alone: with
this one rule, nothing can be listed and yet need no trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stillframe.restore.block_nodes import Image
from stillframe.restore.captured_disks import CapturedBase
from stillframe.restore.disk_use import is_written
from stillframe.restore.forwarded_ports import Forward
from stillframe.restore.image_headers import named_images
from stillframe.restore.option import Option
from stillframe.restore.places import Places, check_socket_path, private_name
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.records import (
    Access,
    DiskOverlay,
    Refusal,
    RestorePlan,
    Rewrite,
    Risk,
    Touch,
    TouchKind,
)
from stillframe.restore.show import shown_words

FIRMWARE_DIRECTORIES = (
    "/usr/share/qemu/",
    "/usr/share/seabios/",
    "/usr/share/OVMF/",
    "/usr/share/ovmf/",
    "/usr/share/edk2/",
    "/usr/share/edk2-ovmf/",
    "/usr/share/pve-edk2-firmware/",
    "/usr/share/qemu-server/",
    "/usr/share/AAVMF/",
    "/usr/share/qemu-efi-aarch64/",
    "/usr/lib/ipxe/qemu/",
)
"""Where distributions install files for VMs to read."""


def is_firmware(name: str) -> bool:
    """Whether an installed file has this bare name."""
    places = (d for top in FIRMWARE_DIRECTORIES for d in (top, f"{top}keymaps/"))
    return any(os.path.exists(place + name) for place in places)  # noqa: PTH110 - any text


_HARMLESS_DEVICES = frozenset({"/dev/urandom", "/dev/random", "/dev/null", "/dev/vhost-net"})
_DISKS_NOTE = "disks are as they are now, not as they were at the snapshot's instant"
_VERBS = {
    "read": "it reads {}",
    "write": "it writes to {}",
    "create": "it makes {}",
    "listen": "it listens on {}",
    "connect": "it connects to {}",
    "run": "it runs {}",
}


class Ledger:
    """The decisions and findings of a plan in the making."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.rewrites: list[Rewrite] = []
        self.touches: list[Touch] = []
        self.overlays: list[DiskOverlay] = []
        self.refusals: list[Refusal] = []
        self.risks: list[Risk] = []
        self.notes: list[str] = []
        self.forwards: list[Forward] = []
        self._names: set[str] = set()

    def touch(
        self,
        kind: TouchKind,
        access: Access,
        target: str,
        option: Option | str = "",
        *,
        required: bool = False,
        reason: str = "",
        own: bool = False,
    ) -> None:
        """Note that something of the host is used, and a risk unless that is harmless.

        Args:
            option: the option that says so. required: the VM cannot start without it.
            reason: replaces the usual words. own: the choice is the caller's, not the file's.
        """
        text = option if isinstance(option, str) else option.text
        entry = Touch(kind=kind, access=access, target=target, option=text, required=required)
        if entry in self.touches:
            return
        self.touches.append(entry)
        if not own and not self._is_harmless(entry):
            self.risk(text, reason or _VERBS[access].format(target))

    def _is_harmless(self, touch: Touch) -> bool:
        if touch.kind == "network":
            return touch.access == "create"
        if touch.kind == "device":
            return touch.target in _HARMLESS_DEVICES
        private = (f"{self.places.run}/", f"{self.places.disks}/")
        if touch.target.startswith(private):
            return True
        # Check both names: a link elsewhere may point somewhere else a moment later.
        names = (touch.target, os.path.realpath(touch.target))
        return touch.access == "read" and all(n.startswith(FIRMWARE_DIRECTORIES) for n in names)

    def risk(self, option: Option | str, reason: str) -> None:
        """Note a risk, for the caller to read and allow."""
        text = option if isinstance(option, str) else option.text
        risk = Risk(option=text or "the command line", reason=reason)
        if risk not in self.risks:
            self.risks.append(risk)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def private_path(self, name: str, suffix: str) -> str:
        """Return a new path in the restore's own directory."""
        name = private_name(name)
        candidate, number = f"{name}{suffix}", 1
        while candidate in self._names:
            candidate, number = f"{name}-{number}{suffix}", number + 1
        self._names.add(candidate)
        return str(self.places.run / candidate)

    def private_socket(self, name: str, option: Option | str) -> str:
        """Return a path for a unix socket of our own."""
        path = self.private_path(name, ".sock")
        check_socket_path(path, made_later=True)
        self.touch("socket", "listen", path, option)
        return path

    def private_file(self, name: str, option: Option | str, suffix: str = ".log") -> str:
        """Return a path for a file of our own."""
        path = self.private_path(name, suffix)
        self.touch("file", "create", path, option)
        return path

    def replace_disk(
        self,
        base: str,
        base_format: str,
        *,
        files: tuple[str, ...],
        kind: Any,
        option: Option | str,
        captured: CapturedBase | None = None,
    ) -> DiskOverlay:
        """Plan an image of our own in place of a disk.

        Args:
            base: path, URL or ``json:{...}``; ``files``: the host's files that hold it.
            kind: ``overlay`` or ``copy``. captured: the base is this disk of the instant.
        """
        suffix = "qcow2" if kind == "overlay" else "raw"
        path = str(self.places.disks / f"disk{len(self.overlays)}.{suffix}")
        written = [file for file in files if is_written(file)]
        overlay = DiskOverlay(
            base=base,
            base_format=base_format,
            overlay=path,
            in_use=bool(written),
            kind=kind,
            captured=captured.label if captured is not None else "",
        )
        self.overlays.append(overlay)
        self.touch("file", "create", path, option)
        if captured is not None:
            self.note_captured(captured, option)
            return overlay
        self.note(_DISKS_NOTE)
        for file in written:
            self.note(
                f"{file} is being written by another program: the copy may hold a mixture"
                if kind == "copy"
                else f"{file} is being written by another program: the restored VM sees those"
                " writes, and its file systems may break; restore it while the first VM is off,"
                " or copy the disk"
            )
        return overlay

    def note_captured(self, base: CapturedBase, option: Option | str) -> None:
        """Note that a disk of the instant is used; the start checks whether its images are there.

        Raises:
            DataError: its format is not that of an image.
        """
        for file in base.files:
            self.touch("file", "read", file, option)
        self.touch_headers(base.top(), option)
        how = "its copy" if base.disk.kind == "copy" else "frozen"
        self.note(f"disk {base.label} is as it was at the instant ({how}: {base.backing})")

    def touch_headers(self, image: Image, option: Option | str) -> None:
        """Note what the headers of an image's files name, since QEMU opens that too."""
        for holder, named in named_images(image):
            if isinstance(named, str):
                self.risk(option, f"the header of {holder} names {named}")
                continue
            for file in named.files:
                reason = f"it reads {file}, which the header of {holder} names"
                self.touch("file", "read", file, option, reason=reason)
            for remote in named.remotes:
                self.touch("network", "connect", remote, option)

    def rewrite(self, before: str, after: str, reason: str) -> None:
        """Note a change of the command line."""
        self.rewrites.append(Rewrite(before=before, after=after, reason=reason))

    def add_monitor(self, qmp_socket: str | None) -> str:
        """Return the path of the new VM's monitor.

        Raises:
            UsageError: a bad path. BusyError: another process listens there.
        """
        path = str(self.places.qmp if qmp_socket is None else Path(qmp_socket).absolute())
        self.touch("socket", "listen", path, own=True)
        check_socket_path(path, made_later=qmp_socket is None)
        return path

    def plan(self, snapshot: PlanSource, argv: tuple[str, ...], **fields: Any) -> RestorePlan:
        """Return the plan with all of this. ``fields``: those that only the planner knows."""
        self.touch("program", "run", argv[0], own=True)
        self.touch("file", "create", str(self.places.log))
        if any(disk.kind == "overlay" for disk in self.overlays):
            self.touch("program", "run", "qemu-img", own=True)
        return RestorePlan(
            snapshot=snapshot.description,
            program=argv[0],
            argv=argv,
            directory=str(self.places.run),
            disk_directory=str(self.places.disks),
            log_path=str(self.places.log),
            rewrites=tuple(self.rewrites),
            touches=tuple(self.touches),
            overlays=tuple(self.overlays),
            refusals=tuple(self.refusals),
            risks=tuple(self.risks),
            notes=tuple(self.notes),
            forwards=tuple(self.forwards),
            taken_here=snapshot.was_taken_here,
            **fields,
        )


def shown_option(option: str, value: object) -> str:
    """Return an option with its value, for people; empty if the value is None."""
    return "" if value is None else shown_words([option, str(value)])
