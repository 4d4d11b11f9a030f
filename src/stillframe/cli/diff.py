"""``stillframe diff``: compare two snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import json_option, parent_dir_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.parameters import FILE
from stillframe.cli.quantities import format_bytes
from stillframe.cli.text import facts, printable, table

if TYPE_CHECKING:
    from stillframe.api import Keys, SnapshotDiff

_MOST_FIELDS = 12
_MOST_CHARACTERS = 34
_COUNTS = ("same", "changed", "new", "zeroed", "absent")


@click.command("diff", short_help="Show what differs between two snapshots.")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@parent_dir_option
@json_option
@key_options
def command(a: str, b: str, as_json: bool, keys: Keys) -> None:
    """Show what differs in snapshot B, against A: pages by block and region, devices by field."""
    from stillframe import api

    found = api.diff(a, b, keys=keys)
    data = {
        "a": {"file": a, "id": found.a},
        "b": {"file": b, "id": found.b},
        "is_descendant": found.is_descendant,
        "blocks": as_object(found.blocks),
        "regions": as_object(found.regions),
        "devices": as_object(found.devices),
        "devices_same": found.devices_same,
    }
    Results(as_json=as_json).show(data, _lines(a, b, found))


def _lines(a: str, b: str, found: SnapshotDiff) -> list[str]:
    differ = sum(block.pages.different for block in found.blocks)
    size = sum(block.pages.different * block.page_bytes for block in found.blocks)
    way = ", an increment on A" if found.is_descendant else ""
    lines = facts(
        [
            ("A", a),
            ("B", f"{b}{way}"),
            ("RAM", f"{differ} pages differ ({format_bytes(size)})" if differ else "the same"),
            ("devices", f"{len(found.devices)} differ, {found.devices_same} are the same"),
        ]
    )
    head = ("SAME", "CHANGED", "NEW", "ZEROED", "ABSENT")
    lines += ["", *_table(("BLOCK", *head), ((_block_name(x), x.pages) for x in found.blocks))]
    regions = [
        (f"{part.gpa:#x} +{format_bytes(part.length_bytes)}", part.pages)
        for part in found.regions
        if part.pages.different
    ]
    if regions:
        lines += ["", *_table(("REGION", *head), regions)]
    for device in found.devices:
        where = f" only in {device.only_in.upper()}" if device.only_in else ""
        count = f", {device.bytes_changed} bytes" if not where else ""
        lines += ["", f"{printable(device.idstr)}, instance {device.instance}{where}{count}"]
        told = [field for field in device.fields if field.path != "bytes"]
        lines += [
            f"  {printable(field.path)}: {_value(field.a)} -> {_value(field.b)}"
            for field in told[:_MOST_FIELDS]
        ]
        if len(told) > _MOST_FIELDS:
            lines.append(f"  and {len(told) - _MOST_FIELDS} fields more; --json shows all")
    return lines


def _block_name(block: Any) -> str:
    return f"{block.idstr} (only in {block.only_in.upper()})" if block.only_in else block.idstr


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, Any]]) -> list[str]:
    cells = [
        (printable(name), *(str(getattr(pages, kind)) for kind in _COUNTS)) for name, pages in rows
    ]
    return table(head, cells, right=",".join(head[1:]))


def _value(value: object) -> str:
    if value is None:
        return "-"
    text = hex(value) if type(value) is int and abs(value) > 9 else str(value)
    return printable(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}...")
