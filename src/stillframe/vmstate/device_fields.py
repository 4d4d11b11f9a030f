"""A device's saved state field by field, as far as the stream's vmdescription describes it.

Source: QEMU ``migration/vmstate.c`` (``vmstate_save_state_v``, ``vmsd_desc_field_start``) and
``scripts/analyze-migration.py``. A device that an old-style function saves is one field of bytes;
so is each one from ``xen-save-devices-state``, which writes no description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from stillframe.errors import DataError
from stillframe.vmstate.devices import DeviceSection
from stillframe.vmstate.x86_cpu import CPU_IDSTR, parse_x86_cpu

Value = int | bool | str
Fields = dict[str, Value]
"""Values by path, such as ``pcihost.config[3]``; bytes that are no number are in hexadecimal."""

_NUMBER = re.compile(r"(u?)int(8|16|32|64)")
_SUBSECTION: Final = 5
_DEPTH_MAX: Final = 64


class _Field(msgspec.Struct):
    name: str
    type: str
    size: int
    array_len: int = 1
    index: int | None = None
    struct: _Structure | None = None


class _Structure(msgspec.Struct):
    fields: list[_Field] = []
    subsections: list[_Structure] = []
    vmsd_name: str = ""
    version: int = 0


class _Device(_Structure, kw_only=True):
    name: str
    instance_id: int


class _Description(msgspec.Struct):
    devices: list[_Device]


def device_fields(
    sections: Sequence[DeviceSection], description: bytes | None
) -> dict[tuple[str, int], Fields]:
    """Return the fields of each device, by (name, instance). A device that is not described, or
    whose payload does not match, has only the field ``bytes``; an x86-64 vCPU then has its
    registers, too."""
    described: dict[tuple[str, int], _Device] = {}
    try:
        devices = msgspec.json.decode(description or b'{"devices":[]}', type=_Description).devices
        described = {(device.name, device.instance_id): device for device in devices}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # then nothing is described
    found: dict[tuple[str, int], Fields] = {}
    for section in sections:
        key = section.idstr, section.instance_id
        found[key] = _fields(section, described.get(key))
    return found


def _fields(section: DeviceSection, described: _Device | None) -> Fields:
    if described is not None and not _is_one_buffer(described):
        try:
            reader = _Reader(section.payload)
            fields = dict(reader.structure(described, "", 0))
            if reader.at == len(section.payload):
                return fields
        except DataError:
            pass
    if section.idstr == CPU_IDSTR:
        try:
            state = msgspec.to_builtins(parse_x86_cpu(section.payload, section.version_id))
            return dict(_flat(state, "")) | {"bytes": section.payload.hex()}
        except DataError:
            pass
    return {"bytes": section.payload.hex()}


def _is_one_buffer(device: _Device) -> bool:
    return len(device.fields) == 1 and device.fields[0].type == "buffer" and not device.subsections


def _flat(value: Any, path: str) -> Iterator[tuple[str, Value]]:
    """Yield the leaves of nested objects and lists, by path."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _flat(part, f"{path}[{number}]")
    else:
        yield path, value


class _Reader:
    """A reader of a payload by its description. All numbers are big-endian."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self.at = 0

    def structure(self, told: _Structure, path: str, depth: int) -> Iterator[tuple[str, Value]]:
        """Yield the fields in order.

        Raises:
            DataError: the payload does not match the description.
        """
        if depth > _DEPTH_MAX:
            raise DataError("a device's description is too deep")
        for field in told.fields:
            name = f"{path}.{field.name}" if path else field.name
            if field.index is not None:
                name += f"[{field.index}]"
            if field.array_len > 1 and field.size <= 0:
                raise DataError("a device's description has fields without a size")
            for number in range(field.array_len):
                one = f"{name}[{number}]" if field.array_len > 1 else name
                yield from self._field(field, one, depth)
        for subsection in told.subsections:
            yield from self._subsection(subsection, path, depth)

    def _field(self, field: _Field, path: str, depth: int) -> Iterator[tuple[str, Value]]:
        start = self.at
        if field.struct is not None:
            yield from self.structure(field.struct, path, depth + 1)
        else:
            yield path, _value(field.type, self._take(field.size))
        if self.at - start != field.size:
            raise DataError(f"{path} has {self.at - start} bytes, not {field.size}")

    def _subsection(self, told: _Structure, path: str, depth: int) -> Iterator[tuple[str, Value]]:
        kind, length = self._take(2)
        name = self._take(length).decode("ascii", "replace")
        version = int.from_bytes(self._take(4), "big")
        if (kind, name, version) != (_SUBSECTION, told.vmsd_name, told.version):
            raise DataError(f"subsection {told.vmsd_name} is not where it should be")
        yield from self.structure(told, f"{path}.{name}" if path else name, depth + 1)

    def _take(self, size: int) -> bytes:
        if not 0 <= size <= len(self._payload) - self.at:
            raise DataError("a device's state ends before its description does")
        self.at += size
        return self._payload[self.at - size : self.at]


def _value(kind: str, raw: bytes) -> Value:
    number = _NUMBER.fullmatch(kind)
    if number is not None and 8 * len(raw) == int(number[2]):
        return int.from_bytes(raw, "big", signed=not number[1])
    if kind == "bool" and len(raw) == 1:
        return raw != b"\0"
    return raw.hex()
