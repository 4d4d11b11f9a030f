"""QEMU's names for drives without an id on the command line (QEMU ``blockdev.c``: drive_new;
``softmmu/vl.c``: the short forms)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from stillframe.machine.qemu.options import Option

SHORT_FORMS = {
    "": {"index": "0", "media": "disk"},
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "mtdblock": {"if": "mtd"},
    "pflash": {"if": "pflash"},
    "sd": {"if": "sd"},
}
_UNITS = {"ide": 2, "scsi": 7}
"""Devices on one bus, for interfaces that have buses."""
_DEFAULTS = ("ide", "virtio", "scsi", "sd")


def drive_fields(option: Option) -> dict[str, str] | None:
    """Return the keys of an option that makes a drive, short forms included; None for other
    options."""
    if option.name == "drive":
        return option.fields()
    short = SHORT_FORMS.get(option.name)
    return None if short is None else {"file": option.value} | short


def drive_names(
    line: Iterable[Option], live: Collection[str], *, one_per_bus: bool = False
) -> list[tuple[Option, str]]:
    """Return the options that make drives, each with the drive's name.

    Args:
        live: names of the existing drives; they reveal the machine's default interface.
        one_per_bus: the machine's IDE buses take one drive each (q35).
    """
    default = next((kind for kind in _DEFAULTS if any(n.startswith(kind) for n in live)), "ide")
    units = _UNITS | ({"ide": 1} if one_per_bus else {})
    taken: set[tuple[str, int, int]] = set()
    found: list[tuple[Option, str]] = []
    for option in line:
        fields = drive_fields(option)
        if fields is None:
            continue
        kind = fields.get("if", default)
        bus, unit = _place(fields, kind, units.get(kind, 0), taken)
        taken.add((kind, bus, unit))
        medium = ("-cd" if fields.get("media") == "cdrom" else "-hd") if kind in units else ""
        number = f"{bus}{medium}{unit}" if kind in units else f"{medium}{unit}"
        found.append((option, fields.get("id") or f"{kind}{number}"))
    return found


def _place(
    fields: dict[str, str], kind: str, units: int, taken: set[tuple[str, int, int]]
) -> tuple[int, int]:
    index, unit = _number(fields.get("index")), _number(fields.get("unit"))
    bus = _number(fields.get("bus")) or 0
    if index is not None:
        return divmod(index, units) if units else (0, index)
    if unit is not None:
        return bus, unit
    unit = 0
    while (kind, bus, unit) in taken:
        unit += 1
        if units and unit >= units:
            bus, unit = bus + 1, 0
    return bus, unit


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def device_id(qdev: str) -> str:
    """Return ``vd0`` for ``/machine/peripheral/vd0/virtio-backend``, which is how ``query-block``
    names a device (or by its id alone); empty for a device without an id."""
    parts = qdev.split("/")
    if not qdev.startswith("/"):
        return qdev
    return parts[3] if len(parts) > 3 and parts[2] == "peripheral" else ""
