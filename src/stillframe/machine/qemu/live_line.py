"""The command line of a QEMU that has what a running one has now (DESIGN section 8).

The recorded line is the basis: whatever still holds stays as written. Unplugged devices are left
out with their backends, plugged ones are added, and media and overlays are the present ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path

import msgspec

from stillframe.machine.process.inspection import ask
from stillframe.machine.qemu.config_file import Expansion
from stillframe.machine.qemu.drive_names import drive_fields, drive_names
from stillframe.machine.qemu.live_backends import Backends, missing
from stillframe.machine.qemu.live_devices import DeviceOptions, LiveDevice, read_devices
from stillframe.machine.qemu.live_disks import DiskLine
from stillframe.machine.qemu.live_rest import unsaid
from stillframe.machine.qemu.options import Option, made, split, words
from stillframe.model import DiskRecord, FileRecord
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_ALIASES = {
    "ac97": "AC97",
    "es1370": "ES1370",
    "ahci": "ich9-ahci",
    "lsi": "lsi53c895a",
    "e1000-82540em": "e1000",
}
"""Device names that are not a prefix of the real name (``softmmu/qdev-monitor.c``)."""
_TELLING = ("mac", "netdev", "chardev", "memdev", "addr", "bus")
"""Properties that reveal a different device under the same id."""


class LiveLine(msgspec.Struct, frozen=True, kw_only=True):
    """``words``: the command line, with the program's name. ``differences``: what it lacks."""

    words: tuple[str, ...]
    files: tuple[FileRecord, ...]
    differences: tuple[str, ...]


def live_line(
    qmp: QmpClient, argv: Sequence[str], directory: Path, disks: Sequence[DiskRecord]
) -> LiveLine:
    """Write the live command line. The guest is not touched.

    Args:
        argv: QEMU's original command line. directory: where it was started.

    Raises:
        MachineError: the monitor went away.
    """
    expansion = Expansion(directory)
    line = expansion.expand(split(argv))
    notes = list(expansion.notes)
    live, describe = read_devices(qmp), DeviceOptions(qmp)
    paired = _pair(line, live, describe)
    gone = {id(o) for o in line if o.name == "device"} - set(paired)
    plugged = [d for d in live if d.path not in {p.path for p in paired.values()}]
    backends, nodes = Backends(qmp), _nodes(qmp)
    kept, paths = list[Option](), dict[str, str]()
    for option in line:
        if id(option) in gone or not (backends.has(option) and _has_node(nodes, option)):
            continue
        device = paired.get(id(option))
        if device is not None and gone:  # else devices after the gone ones would move up
            fields = option.fields()
            place = {k: v for k, v in describe.place(device).items() if k not in fields}
            kept.append(option.changed(place))
        else:
            kept.append(option)
        if device is not None:
            paths[kept[-1].value] = device.path
    as_json = any(option.name == "device" and option.is_json for option in line)
    added = []
    for device in plugged:
        drive = _made_by_drive(device, disks, kept)
        shared = _made_by_virtfs(device, describe, kept)
        if (shared is not None and not gone) or _is_debugcon(device, kept):
            continue
        if drive is None:
            new_fields = describe.all(device)
            if shared is not None:
                kept[kept.index(shared[0])] = shared[1]
        elif gone:
            kept[kept.index(drive[0])] = drive[1]
            new_fields = {
                "driver": device.kind,
                "drive": drive[1].identity,
                **describe.place(device),
            }
        else:
            continue
        option = made("device", new_fields, as_json=as_json)
        paths[option.value] = device.path
        added.append(option)
    nics = sum(describe.has(device, "netdev") for device in live)
    notes += unsaid(qmp, line, nics=backends.nics, plugged_nics=nics)
    new = missing(backends, kept, added)
    there = {(option.name, option.identity) for option in [*kept, *new]}
    notes += [
        f"{option.identity or option.value}: its {kind} {name} cannot be described"
        for option in added
        for kind, name in backends.needed(option)
        if (kind, name) not in there
    ]
    machine = str(ask(qmp, "qom-get", {"path": "/machine", "property": "type"}))
    disk_line = DiskLine([*kept, *new, *added], disks, directory, machine)
    line = disk_line.update(paths)
    return LiveLine(
        words=(*argv[:1], *words(line)),
        files=tuple(expansion.files),
        differences=(*notes, *disk_line.notes),
    )


def _nodes(qmp: QmpClient) -> Set[str]:
    found = as_list(ask(qmp, "query-named-block-nodes", {"flat": True}))
    return {str(as_map(node).get("node-name")) for node in found}


def _has_node(nodes: Set[str], option: Option) -> bool:
    return option.name != "blockdev" or option.identity in nodes


def _made_by_drive(
    device: LiveDevice, disks: Iterable[DiskRecord], line: Iterable[Option]
) -> tuple[Option, Option] | None:
    """Return the ``-drive`` that a device comes from (``if=virtio``), and the same without a
    device."""
    names = {disk.device for disk in disks if disk.qdev.startswith(f"{device.path}/")}
    for option, name in drive_names(line, {disk.device for disk in disks}):
        fields = drive_fields(option) or {}
        if name in names and not device.id and fields.get("if") != "none":
            rest = {k: v for k, v in fields.items() if k not in ("if", "index", "bus", "unit")}
            return option, made("drive", rest | {"if": "none", "id": name})
    return None


def _made_by_virtfs(
    device: LiveDevice, describe: DeviceOptions, line: Iterable[Option]
) -> tuple[Option, Option] | None:
    """Return the ``-virtfs`` that a device comes from (QEMU ``system/vl.c``), and the same without
    a device."""
    if not device.kind.startswith("virtio-9p"):
        return None
    name = describe.text(device, "fsdev")
    for option in line:
        fields = option.fields()
        if option.name == "virtfs" and name == (option.identity or fields.get("mount_tag")):
            rest = {key: value for key, value in fields.items() if key != "mount_tag"}
            return option, made("fsdev", rest | {"id": name})
    return None


def _is_debugcon(device: LiveDevice, line: Iterable[Option]) -> bool:
    """Return whether ``-debugcon`` makes the device (QEMU ``system/vl.c``), whatever else is on the
    bus."""
    return device.id == "debugcon" and any(option.name == "debugcon" for option in line)


def _pair(
    line: Iterable[Option], live: Sequence[LiveDevice], describe: DeviceOptions
) -> dict[int, LiveDevice]:
    """Return the live device that each ``-device`` option has made, by the ``id()`` of the
    option."""
    options = [option for option in line if option.name == "device"]
    named = {device.id: device for device in live if device.id}
    found = {
        id(option): named[option.identity]
        for option in options
        if option.identity in named and _is_still(option, named[option.identity], describe)
    }
    # Devices without an id are in the order of their creation: JSON options come last.
    waiting = [device for device in live if not device.id]
    anonymous = sorted((o for o in options if not o.identity), key=lambda o: o.is_json)
    for telling in ((*_TELLING, "drive"), _TELLING):  # another medium, another drive
        for option in anonymous:
            same = (d for d in waiting if _is_still(option, d, describe, telling))
            device = next(same, None) if id(option) not in found else None
            if device is not None:
                waiting.remove(device)
                found[id(option)] = device
    return found


def _is_still(
    option: Option,
    device: LiveDevice,
    describe: DeviceOptions,
    telling: Iterable[str] = _TELLING,
) -> bool:
    """Return whether an option has made this live device."""
    fields = option.fields()
    driver = fields.get("driver", "")
    if device.kind not in (driver, _ALIASES.get(driver)) and not device.kind.startswith(
        f"{driver}-"
    ):
        return False
    return all(
        _plain(key, fields[key]) == _plain(key, describe.text(device, key))
        for key in telling
        if key in fields
    )


def _plain(key: str, value: str) -> str:
    """Return one canonical form of equivalent values."""
    if key == "addr":
        parts = [part.removeprefix("0x").lstrip("0") or "0" for part in value.lower().split(".")]
        return ".".join([*parts, "0"][:2])
    return value.lower()
