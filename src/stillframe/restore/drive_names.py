"""The name that QEMU gives a ``-drive`` without an id, by which its monitor calls the disk.

Source: QEMU ``blockdev.c`` (drive_new: bus, unit and the id made of them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count

from stillframe.restore.drives import SHORT_FORMS, as_drive
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_PC = ("pc", "q35", "isapc", "xenfv")


def drive_names(recorded: Sequence[Option], machine_type: str) -> dict[int, str]:
    """Return the names of all ``-drive``, ``-hda`` etc. without an id, by ``id(option)``."""
    usual = "ide" if machine_type.startswith(_PC) else "virtio"
    # A SATA bus has one place.
    units = {"ide": 1 if "q35" in machine_type else 2, "scsi": 7}
    taken: set[tuple[str, int, int]] = set()
    names: dict[int, str] = {}
    for option in recorded:
        if option.name != "drive" and option.name not in SHORT_FORMS:
            continue
        value = as_drive(option)
        kind = value.get("if") or usual
        most = units.get(kind, 0)
        place = _place(value, kind, most, taken)
        taken.add((kind, *place))
        if not value.get("id"):
            media = "-cd" if value.get("media") == "cdrom" else "-hd"
            names[id(option)] = (
                f"{kind}{place[0] if most else ''}{media if kind in units else ''}{place[1]}"
            )
    return names


def _place(
    value: OptionValue, kind: str, most: int, taken: set[tuple[str, int, int]]
) -> tuple[int, int]:
    """Return (bus, unit); without an index or a unit, the first free one."""
    bus, unit, index = (_number(value.get(key)) for key in ("bus", "unit", "index"))
    if index is not None:
        return divmod(index, most) if most else (0, index)
    if unit is not None:
        return bus or 0, unit
    # A full bus is followed by the next one (QEMU blockdev.c: drive_new).
    first = bus or 0
    places = ((first + at // most, at % most) if most else (first, at) for at in count())
    return next(place for place in places if (kind, *place) not in taken)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None
