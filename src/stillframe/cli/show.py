"""``stillframe show``: show the content of a snapshot file."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.keys import key_options
from stillframe.cli.options import force_option, json_option, parent_dir_option, store_option
from stillframe.cli.output import Results, as_object
from stillframe.cli.parameters import FILE, SNAPSHOT
from stillframe.cli.quantities import format_bytes
from stillframe.cli.ram_map import map_lines, map_object
from stillframe.cli.take_result import statistics_facts
from stillframe.cli.text import facts, printable, table

if TYPE_CHECKING:
    from stillframe.api import Keys, Snapshot


@click.command("show", short_help="Show a snapshot: machine, RAM blocks, devices, numbers.")
@click.argument("file", type=SNAPSHOT)
@store_option
@parent_dir_option
@click.option(
    "--map",
    "map_file",
    type=FILE,
    metavar="PNG",
    help="Draw RAM by guest-physical address into this file.",
)
@force_option
@json_option
@key_options
def command(file: str, map_file: str | None, force: bool, as_json: bool, keys: Keys) -> None:
    """Show a snapshot: machine, blocks with their classes of pages, devices, numbers."""
    from stillframe import api

    with api.open(file, keys=keys) as snapshot:
        data = _as_json_object(file, snapshot)
        lines = _as_lines(file, snapshot, data)
        if map_file is not None:
            drawn = api.draw_ram(snapshot)
            api.write_file(map_file, drawn.png, overwrite=force)
            data["map"] = map_object(map_file, drawn)
            lines += ["", *map_lines(map_file, drawn)]
    Results(as_json=as_json).show(data, lines)


def _as_json_object(file: str, snapshot: Snapshot) -> dict[str, Any]:
    manifest, skeleton = snapshot.manifest, snapshot.skeleton()
    said = as_object(manifest)
    del said["page_origins"]  # for --map
    return {
        "file": file,
        "id": snapshot.id,
        "file_bytes": snapshot.file_bytes,
        "encrypted": snapshot.is_encrypted,
        **said,
        "chain": [{"id": part.id, "file": part.place} for part in snapshot.files[1:]],
        "machine_type": skeleton.configuration.name if skeleton.configuration else None,
        "blocks": _blocks(snapshot),
        "devices": [
            {
                "idstr": section.idstr,
                "instance": section.instance_id,
                "version": section.version_id,
                "bytes": len(section.payload),
            }
            for section in skeleton.devices
        ],
    }


def _blocks(snapshot: Snapshot) -> list[dict[str, Any]]:
    page_bytes = snapshot.manifest.target_page_bytes
    found = []
    for number, block in enumerate(snapshot.blocks):
        data, zero = snapshot.index.page_counts(number)
        pages = -(-block.used_length_bytes // page_bytes)
        found.append(
            {
                "idstr": block.idstr,
                "used_length_bytes": block.used_length_bytes,
                "page_size_bytes": block.page_size_bytes,
                "pages": {
                    "total": pages,
                    "data": data,
                    "zero": zero,
                    "missing": pages - data - zero,
                },
            }
        )
    return found


def _as_lines(file: str, snapshot: Snapshot, data: dict[str, Any]) -> list[str]:
    manifest = snapshot.manifest
    ram_bytes = sum(block.used_length_bytes for block in snapshot.blocks)
    ratio = ram_bytes / max(1, snapshot.file_bytes)
    lines = facts(
        [
            ("snapshot", file),
            ("id", snapshot.id),
            ("created", f"{manifest.created} by stillframe {manifest.stillframe_version}"),
            ("mode", manifest.mode),
            *([("encrypted", "AES-256-GCM")] if data["encrypted"] else []),
            *_parents(snapshot),
            ("machine", _machine_line(data)),
            *_without(data),
            *_command_line(data["machine"]),
            (
                "size",
                f"{format_bytes(snapshot.file_bytes)} for {format_bytes(ram_bytes)} of RAM"
                f" ({ratio:.1f} to 1; the stream has {format_bytes(manifest.stream_bytes)})",
            ),
            *(statistics_facts(manifest.statistics) if manifest.statistics is not None else ()),
        ]
    )
    lines += ["", *_block_table(data)]
    if data["captured_disks"]:
        lines += ["", *_captured_table(data)]
    elif data["machine"] and data["machine"]["disks"]:
        lines += ["", *_disk_table(data)]
    lines += ["", *_device_table(data)]
    return [
        *lines,
        *([""] if manifest.notes else []),
        *(f"note: {printable(note)}" for note in manifest.notes),
    ]


def _parents(snapshot: Snapshot) -> list[tuple[str, str]]:
    """The snapshot's ancestors, nearest first."""
    return [
        ("parent" if depth == 0 else "", f"{file.id} ({file.place})")
        for depth, file in enumerate(snapshot.files[1:])
    ]


def _machine_line(data: dict[str, Any]) -> str:
    machine = data["machine"]
    if machine is None:
        return f"{data['machine_type'] or 'unknown'} (imported)"
    name = f"{machine['name']}: " if machine["name"] else ""
    return (
        f"{name}{machine['machine_type']}, {machine['vmm']} {machine['vmm_version']},"
        f" {machine['accelerator']}, {machine['vcpus']} vCPU, was {machine['guest_state']}"
    )


def _command_line(machine: dict[str, Any] | None) -> list[tuple[str, str]]:
    words = (machine["command_line"] or machine["argv"]) if machine else None
    return [("command", shlex.join(words))] if words else []


def _block_table(data: dict[str, Any]) -> list[str]:
    return table(
        ("BLOCK", "SIZE", "PAGES", "DATA", "ZERO", "MISSING"),
        [
            (
                block["idstr"],
                format_bytes(block["used_length_bytes"]),
                *(str(block["pages"][kind]) for kind in ("total", "data", "zero", "missing")),
            )
            for block in data["blocks"]
        ],
        right="SIZE,PAGES,DATA,ZERO,MISSING",
    )


def _disk_table(data: dict[str, Any]) -> list[str]:
    return table(
        ("DISK", "DRIVER", "FILE"),
        [
            (disk["device"] or disk["node_name"] or "-", disk["driver"], disk["filename"])
            for disk in data["machine"]["disks"]
        ],
    )


def _without(data: dict[str, Any]) -> list[tuple[str, str]]:
    names = ", ".join(data["without_disks"])
    return [("disks", f"without disks: {names} are not in the snapshot")] if names else []


def _captured_table(data: dict[str, Any]) -> list[str]:
    """The table of disks, each followed by its backing images."""
    rows = []
    for disk in data["captured_disks"]:
        name = disk["device"] or disk["qdev"] or disk["node_name"]
        for depth, file in enumerate(disk["files"]):
            kind = disk["kind"] if depth == 0 else "on"
            size = format_bytes(file["size_bytes"])
            rows.append((name if depth == 0 else "", kind, file["format"], size, file["path"]))
    return table(("DISK", "KIND", "FORMAT", "SIZE", "FILE"), rows, right="SIZE")


def _device_table(data: dict[str, Any]) -> list[str]:
    return table(
        ("DEVICE", "INSTANCE", "VERSION", "BYTES"),
        [
            tuple(str(device[key]) for key in ("idstr", "instance", "version", "bytes"))
            for device in data["devices"]
        ],
        right="INSTANCE,VERSION,BYTES",
    )
