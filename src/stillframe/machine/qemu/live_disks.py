"""Updates to the disks of a command line: changed media, overlays, other nodes.

Sources: QEMU ``blockdev.c``, ``qapi/block-core.json``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stillframe.machine.qemu.drive_names import device_id, drive_fields, drive_names
from stillframe.machine.qemu.options import Option, made
from stillframe.model import DiskRecord, ImageRecord

_FILES = frozenset({"file", "host_device", "host_cdrom"})
_WEB = frozenset({"http", "https", "ftp", "ftps"})
_WITH_BACKING = frozenset({"qcow2", "qcow", "qed", "vmdk", "parallels"})
_LOCATION = ("file", "format", "driver", "backing")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_OWN_DRIVE = re.compile(r"(ide|floppy|sd)(\d+)(?:-cd(\d+))?")
_NODE_NAME_MAX = 31


class DiskLine:
    """A command line, brought up to date with the existing disks; ``notes``: what no option can
    express."""

    def __init__(
        self, line: Iterable[Option], disks: Sequence[DiskRecord], directory: Path, machine: str
    ) -> None:
        self.line = list(line)
        self.notes: list[str] = []
        self._disks = disks
        self._directory = directory
        self._one_per_bus = "q35" in machine
        self._new: dict[str, Option] = {}
        self._changed = False

    def update(self, devices: Mapping[str, str]) -> list[Option]:
        """Return the line with the present disks.

        Args:
            devices: value of a ``-device`` option to its QOM path.
        """
        self._drives()
        found = []
        for option in self.line:
            path = devices.get(option.value) if option.name == "device" else None
            disk = next((d for d in self._disks if path and _is_at(d.qdev, path)), None)
            found.append(option if disk is None else self._device(option, disk))
        self.line = [o for o in found if o.name != "blockdev" or o.identity not in self._new]
        self.line += self._new.values()
        if self._changed:
            self._prune()
        return self.line

    # -drive

    def _drives(self) -> None:
        self.notes += [
            f"disk {_called(disk)} writes to a temporary file (snapshot=on): what the guest wrote"
            f" is not in {disk.filename}"
            for disk in self._disks
            if disk.temporary
        ]
        live = {disk.device: disk for disk in self._disks if disk.device}
        names = drive_names(self.line, live, one_per_bus=self._one_per_bus)
        for option, name in names:
            disk = live.pop(name, None)
            index = next(i for i, other in enumerate(self.line) if other is option)
            if disk is None:
                del self.line[index]
            else:
                self.line[index] = self._drive(option, disk)
        for disk in live.values():
            match = _OWN_DRIVE.fullmatch(disk.device)
            if match and disk.filename:  # a medium in one of the machine's built-in drives
                kind, bus, unit = match[1], match[2], match[3]
                place = {"bus": bus, "unit": unit} if unit else {"bus": "0", "unit": bus}
                self._warn_of_address(disk)
                fields = {"if": kind, **place} | ({"media": "cdrom"} if unit else {})
                self.line.append(made("drive", fields | _opened(disk)))

    def _drive(self, option: Option, disk: DiskRecord) -> Option:
        fields = drive_fields(option) or {}
        given = fields.get("file.filename") or fields.get("file", "")
        if given in {image.node_name for image in disk.images[:1]}:
            return option  # names a node of a -blockdev
        if disk.filename == given or self._same(given, disk):
            return option
        self._warn_of_address(disk)
        stays = {
            key: value
            for key, value in fields.items()
            if key not in _LOCATION and not key.startswith(("file.", "backing."))
        }
        if disk.removable and disk.read_only and "media" not in stays:
            stays["media"] = "cdrom"
        return made("drive", stays | _opened(disk))

    def _same(self, given: str, disk: DiskRecord) -> bool:
        """Return whether a recorded file name is the live one."""
        driver = disk.images[-1 if disk.temporary else 0].driver if disk.images else ""
        given = given.removeprefix("file:")
        if _ADDRESS.match(given):
            remote = driver not in _FILES
            return remote and not (driver in _WEB and given.startswith("http"))
        return bool(given and disk.filename) and self._real(given) == self._real(disk.filename)

    def _real(self, path: str) -> str:
        return os.path.realpath(self._directory / path)

    def _warn_of_address(self, disk: DiskRecord) -> None:
        for image in disk.images[1 if disk.temporary else 0 :][:1]:
            if image.driver not in _FILES | _WEB:
                self.notes.append(
                    f"disk {_called(disk)} is {image.filename} now: check it when restoring"
                )

    # -device NAME,drive=NODE

    def _device(self, option: Option, disk: DiskRecord) -> Option:
        given = option.fields().get("drive", "")
        named = any(drive_fields(o) is not None and o.identity == disk.device for o in self.line)
        if disk.device and named:
            return option
        if not disk.images:
            self._changed = True
            return option.changed(without=("drive",))
        name = disk.node_name
        if not self._recorded_chain(name, disk):
            new = self._nodes(disk)
            if new is None:
                self.notes.append(
                    f"disk {_called(disk)} has become {disk.filename}, which has no -blockdev here"
                )
                return option
            self._new |= {node.identity: node for node in new}
            name = new[-1].identity
        elif name == given:
            return option
        self._changed = True
        return option.changed({"drive": name})

    def _recorded_chain(self, name: str, disk: DiskRecord) -> bool:
        """Return whether the recorded ``-blockdev`` options lead from a node to the live images."""
        nodes = {o.identity: o.fields() for o in self.line if o.name == "blockdev"}
        live = [image.filename for image in disk.images]
        for filename in live:
            if name not in nodes:
                return False
            place = _file_of(nodes, name)
            if place is not None and self._real(place) != self._real(filename):
                return False
            backing = _below(nodes, name)
            if backing is None:
                return True  # the image itself says what lies below it
            if not backing:
                return filename == live[-1]
            name = backing
        return False

    def _nodes(self, disk: DiskRecord) -> list[Option] | None:
        """Return new ``-blockdev`` options, lowest image first; None if an image cannot be
        expressed as one."""
        images = disk.images[1 if disk.temporary else 0 :]
        made_: list[Option] = []
        for level, image in reversed(list(enumerate(images))):
            source = _source(image)
            if source is None:
                return None
            fields: dict[str, object] = {
                "driver": image.format,
                "node-name": _node_name(disk, image, level),
                "read-only": image.read_only,
                "file": source,
            }
            if image.format in _WITH_BACKING:
                fields["backing"] = made_[-1].identity if made_ else None
            made_.append(made("blockdev", fields, as_json=True))
        return made_

    def _prune(self) -> None:
        """Drop nodes that no device leads to any more."""
        named = {v for o in self.line if o.name != "blockdev" for v in o.fields().values()}
        nodes = [option for option in self.line if option.name == "blockdev"]
        reached: set[str] = set()
        while new := named - reached:
            reached |= new
            named = {v for o in nodes if o.identity in new for v in o.fields().values()}
        self.line = [o for o in self.line if o.name != "blockdev" or o.identity in reached]


def _is_at(qdev: str, path: str) -> bool:
    """Return whether ``query-block`` means the device at a QOM path; it gives the id if there is
    one (QEMU ``block/block-backend.c``: blk_get_attached_dev_id)."""
    return f"{qdev}/".startswith(f"{path}/") or path == f"/machine/peripheral/{qdev}"


def _called(disk: DiskRecord) -> str:
    without_id = disk.qdev.removesuffix("/virtio-backend").rpartition("/")[2]
    return disk.device or device_id(disk.qdev) or without_id


def _opened(disk: DiskRecord) -> dict[str, str]:
    return {"file": disk.filename, "format": disk.driver} if disk.filename else {}


def _source(image: ImageRecord) -> dict[str, object] | None:
    if image.driver in _FILES:
        return {"driver": image.driver, "filename": image.filename}
    if image.driver in _WEB and not image.filename.startswith("json:"):
        return {"driver": image.driver, "url": image.filename}
    return None


def _node_name(disk: DiskRecord, image: ImageRecord, level: int) -> str:
    if image.node_name and not image.node_name.startswith("#"):
        return image.node_name
    return f"{re.sub(r'[^A-Za-z0-9]', '', _called(disk))[:20]}-image-{level}"[-_NODE_NAME_MAX:]


def _file_of(nodes: Mapping[str, Mapping[str, str]], name: str) -> str | None:
    """Return the file that a recorded node shows; None if it shows none."""
    for _ in range(len(nodes) + 1):
        fields = nodes.get(name, {})
        found = fields.get("filename") or fields.get("file.filename")
        if found:
            return found
        name = fields.get("file", "")
    return None


def _below(nodes: Mapping[str, Mapping[str, str]], name: str) -> str | None:
    """Return the recorded backing node; empty if the option rules one out, None if the image names
    it."""
    for _ in range(len(nodes) + 1):
        fields = nodes.get(name, {})
        if "backing" in fields:
            return fields["backing"]
        if any(key.startswith("backing.") for key in fields):
            return None
        if fields.get("driver") not in ("throttle", "copy-on-read"):
            return None
        name = fields.get("file", "")
    return None
