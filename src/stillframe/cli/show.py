"""``stillframe show``: what a snapshot file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.options import FILE, json_option
from stillframe.cli.output import Results
from stillframe.cli.quantities import format_bytes
from stillframe.cli.take_result import statistics_facts, statistics_object
from stillframe.cli.text import facts, printable, table

if TYPE_CHECKING:
    from stillframe.api import Snapshot
    from stillframe.model import MachineRecord


@click.command("show", short_help="Show a snapshot: machine, RAM blocks, devices, numbers.")
@click.argument("file", type=FILE)
@json_option
def command(file: str, as_json: bool) -> None:
    """Show a snapshot: machine, blocks with their classes of pages, devices, numbers."""
    from stillframe import api

    with api.open(file) as snapshot:
        data = _as_json_object(file, snapshot)
        lines = _as_lines(file, snapshot, data)
    Results(as_json=as_json).show(data, lines)


def _as_json_object(file: str, snapshot: Snapshot) -> dict[str, Any]:
    manifest, skeleton = snapshot.manifest, snapshot.skeleton()
    machine, numbers = manifest.machine, manifest.statistics
    return {
        "file": file,
        "id": snapshot.id,
        "file_bytes": snapshot.file_bytes,
        "format": manifest.format,
        "created": manifest.created,
        "mode": manifest.mode,
        "stillframe_version": manifest.stillframe_version,
        "stream_bytes": manifest.stream_bytes,
        "target_page_bytes": manifest.target_page_bytes,
        "machine_type": skeleton.configuration.name if skeleton.configuration else None,
        "machine": _machine(machine) if machine is not None else None,
        "blocks": _blocks(snapshot),
        "memory_map": [
            {
                "gpa": part.gpa,
                "length_bytes": part.length_bytes,
                "idstr": part.idstr,
                "offset_bytes": part.offset_bytes,
            }
            for part in manifest.memory_map
        ],
        "devices": [
            {
                "idstr": section.idstr,
                "instance": section.instance_id,
                "version": section.version_id,
                "bytes": len(section.payload),
            }
            for section in skeleton.devices
        ],
        "statistics": statistics_object(numbers) if numbers is not None else None,
        "notes": list(manifest.notes),
    }


def _machine(machine: MachineRecord) -> dict[str, Any]:
    return {
        "name": machine.name,
        "pid": machine.pid,
        "uid": machine.uid,
        "vmm": machine.vmm,
        "vmm_version": machine.vmm_version,
        "machine_type": machine.machine_type,
        "accelerator": machine.accelerator,
        "guest_state": machine.guest_state,
        "vcpus": machine.vcpus,
        "executable": machine.executable,
        "argv": list(machine.argv),
        "cwd": machine.cwd,
        "disks": [
            {
                "device": disk.device,
                "node_name": disk.node_name,
                "driver": disk.driver,
                "filename": disk.filename,
                "read_only": disk.read_only,
            }
            for disk in machine.disks
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
            ("machine", _machine_line(data)),
            *_command_line(data),
            (
                "size",
                f"{format_bytes(snapshot.file_bytes)} for {format_bytes(ram_bytes)} of RAM"
                f" ({ratio:.1f} to 1; the stream has {format_bytes(manifest.stream_bytes)})",
            ),
            *(statistics_facts(manifest.statistics) if manifest.statistics is not None else ()),
        ]
    )
    lines += ["", *_block_table(data)]
    if data["machine"] and data["machine"]["disks"]:
        lines += ["", *_disk_table(data)]
    lines += ["", *_device_table(data)]
    return [
        *lines,
        *([""] if manifest.notes else []),
        *(f"note: {printable(note)}" for note in manifest.notes),
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


def _command_line(data: dict[str, Any]) -> list[tuple[str, str]]:
    import shlex

    machine = data["machine"]
    return [("command", shlex.join(machine["argv"]))] if machine else []


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


def _device_table(data: dict[str, Any]) -> list[str]:
    return table(
        ("DEVICE", "INSTANCE", "VERSION", "BYTES"),
        [
            (
                device["idstr"],
                str(device["instance"]),
                str(device["version"]),
                str(device["bytes"]),
            )
            for device in data["devices"]
        ],
        right="INSTANCE,VERSION,BYTES",
    )
