"""Devices field by field: of streams that real QEMUs wrote, and of hostile descriptions."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from stillframe.vmstate.device_fields import device_fields
from stillframe.vmstate.devices import DeviceSection, make_section
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Description, Device
from tests.compat.record_streams import load
from tests.support.analyze_reader import Analysis


def flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [(f"{path}.{name}" if path else name, part) for name, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{path}[{number}]", part) for number, part in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for at, part in parts for name, leaf in flat(part, at).items()}


@pytest.mark.parametrize("name", ["q35-precopy", "pc-background"])
def test_the_fields_are_those_that_an_independent_reader_finds(name: str) -> None:
    stream = load(name)
    sections: list[DeviceSection] = []
    text = b""
    for event in StreamReader(io.BytesIO(stream)).events():
        if isinstance(event, Device):
            sections.append(event.section)
        elif isinstance(event, Description):
            text = event.text
    fields = device_fields(sections, text)
    read = Analysis(stream).state
    compared = 0
    for section in sections:
        ours = fields[section.idstr, section.instance_id]
        theirs = flat(read[f"{section.idstr} ({section.section_id})"], "")
        if set(ours) != {"bytes"}:
            assert ours == theirs
            compared += len(ours)
    assert compared > 300


def one(payload: bytes = b"\0\0\0\7abc") -> DeviceSection:
    return make_section(section_id=1, idstr="toy", instance_id=0, version_id=1, payload=payload)


def described(*fields: dict[str, Any], **more: Any) -> bytes:
    device = {"name": "toy", "instance_id": 0, "fields": fields} | more
    return json.dumps({"devices": [device]}).encode()


NUMBER = {"name": "n", "type": "uint32", "size": 4}
REST = {"name": "rest", "type": "buffer", "size": 3}


def test_numbers_and_bytes() -> None:
    assert device_fields([one()], described(NUMBER, REST)) == {
        ("toy", 0): {"n": 7, "rest": b"abc".hex()}
    }


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"{",
        b"[" * 10000,
        b'{"devices": 1}',
        described(NUMBER),
        described(NUMBER, REST, NUMBER),
        described(NUMBER | {"size": -4}, REST),
        described(NUMBER | {"array_len": 1 << 60}, REST),
        described(NUMBER | {"array_len": 1 << 60, "size": 0}, REST),
        described(NUMBER, REST, subsections=[{"vmsd_name": "s", "version": 1, "fields": []}]),
        described({"name": "s", "type": "struct", "size": 9, "struct": {"fields": [NUMBER]}}),
    ],
)
def test_what_is_not_as_described_is_bytes(text: bytes | None) -> None:
    assert device_fields([one()], text) == {("toy", 0): {"bytes": one().payload.hex()}}


def test_a_description_that_is_too_deep() -> None:
    field: dict[str, Any] = NUMBER
    for _ in range(80):
        field = {"name": "s", "type": "struct", "size": 4, "struct": {"fields": [field]}}
    assert device_fields([one()], described(field, REST)) == {
        ("toy", 0): {"bytes": one().payload.hex()}
    }
