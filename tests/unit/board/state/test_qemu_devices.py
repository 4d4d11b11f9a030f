"""Real QEMU's device sections: declared from their vmdescription, they load, and are saved and
described again byte for byte."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.board.state import fields
from stillframe.board.state.fields import (
    Field,
    StateDescription,
    describe_state,
    load_state,
    save_state,
)
from stillframe.vmstate.devices import DeviceSection
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Description, Device
from stillframe.vmstate.source import StreamSource
from tests.compat.record_streams import load

SCALARS = {
    "uint8": fields.u8,
    "uint16": fields.u16,
    "uint32": fields.u32,
    "uint64": fields.u64,
    "int32": fields.i32,
    "int64": fields.i64,
    "bool": fields.boolean,
}
OTHERS = {
    "timer",
    "pci config",
    "pci irq state",
    "virtio",
    "int32 le",
    "int32 equal",
    "uint8 equal",
}
"""QEMU's own kinds of bytes: buffers for us."""


def device(desc: dict[str, Any], objects: SimpleNamespace) -> StateDescription:
    """The declaration of what is described; ``objects`` gets the embedded objects."""
    declared: list[Field] = []
    rest = list(desc["fields"])
    while rest:
        field = rest.pop(0)
        same = [field]
        while field.get("index") == 0 and rest and rest[0].get("index") == len(same):
            same.append(rest.pop(0))
        declared.append(one_field(field, same, objects))
    return StateDescription(
        desc["vmsd_name"],
        desc["version"],
        desc["version"],
        tuple(declared),
        tuple(device(s, objects) for s in desc.get("subsections", ())),
    )


def one_field(field: dict[str, Any], same: list[dict[str, Any]], objects: SimpleNamespace) -> Field:
    name, kind, size = field["name"], field["type"], field["size"]
    count = field.get("array_len", len(same))
    # As in QEMU, only a field with a condition has its numbers described one by one.
    exists = (lambda device, version: True) if len(same) > 1 else None
    if kind == "struct":
        inner = [SimpleNamespace() for _ in range(count)]
        described = [device(f["struct"], inner[i]) for i, f in enumerate(same)]
        for other in inner[len(same) :]:
            device(field["struct"], other)
        assert all(f["struct"] == field["struct"] for f in same), "elements differ"
        if count == 1:
            setattr(objects, name, inner[0])
            return fields.struct(name, described[0])
        setattr(objects, name, inner)
        return fields.struct_array(name, described[0], count, exists=exists)
    if kind == "unused_buffer":
        return fields.unused(size)
    if kind in SCALARS:
        scalar = SCALARS[kind]
        return scalar(name) if count == 1 else fields.array(name, scalar, count, exists=exists)
    assert kind == "buffer" or kind in OTHERS, kind
    assert count == 1
    return fields.buffer(name, size)


def plain(described: Any) -> Any:
    """The description with our names of the kinds."""
    if isinstance(described, list):
        return [plain(d) for d in described]
    if isinstance(described, dict):
        kind = described.get("type")
        other = {"type": "buffer"} if kind in OTHERS else {}
        return {k: plain(v) for k, v in described.items()} | other
    return described


def holds(described: dict[str, Any], *kinds: str) -> bool:
    return any(f'"type": "{kind}"' in json.dumps(described) for kind in kinds)


def odd_subsections(described: dict[str, Any]) -> bool:
    """QEMU has a few that are not called after their device and a slash, which we want."""
    name = described["vmsd_name"]
    return any(not s["vmsd_name"].startswith(f"{name}/") for s in described.get("subsections", ()))


def sections(name: str) -> list[tuple[DeviceSection, dict[str, Any]]]:
    events = list(StreamReader(io.BytesIO(load(name))).events())
    (text,) = (json.loads(e.text) for e in events if isinstance(e, Description))
    by_name = {(d["name"], d["instance_id"]): d for d in text["devices"]}
    return [
        (e.section, by_name[(e.section.idstr, e.section.instance_id)])
        for e in events
        if isinstance(e, Device)
    ]


@pytest.mark.parametrize(("name", "count"), [("q35-precopy", 29), ("pc-background", 32)])
def test_real_sections(name: str, count: int) -> None:
    done = 0
    for section, described in sections(name):
        if "vmsd_name" not in described or holds(described, "tmp") or odd_subsections(described):
            continue
        machine = SimpleNamespace()
        description = device(described, machine)
        source = StreamSource(io.BytesIO(section.payload))
        load_state(description, machine, source, section.version_id)
        assert source.peek() is None
        assert save_state(description, machine) == section.payload
        expected = {k: v for k, v in described.items() if k not in ("name", "instance_id")}
        again = describe_state(description, machine)
        assert json.dumps(plain(again)) == json.dumps(plain(expected))
        done += 1
    assert done == count


@pytest.mark.parametrize("what", ['"subsections": [', '"index": 1', '"array_len": ', '"struct": {'])
def test_recordings_have_all_forms(what: str) -> None:
    """So that the test above means something."""
    texts = [json.dumps(d) for name in ("q35-precopy", "pc-background") for _, d in sections(name)]
    assert any(what in text and '"tmp"' not in text for text in texts)
