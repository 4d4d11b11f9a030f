"""Saving a device's declared state, and describing what was saved.

Source: QEMU ``migration/vmstate.c``: ``vmstate_save_state_v``, ``vmstate_subsection_save``,
``vmsd_desc_field_start``.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from struct import error as struct_error
from typing import Any

from stillframe.errors import InternalError
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.state_description import (
    Array,
    Buffer,
    Embedded,
    EmbeddedArray,
    Field,
    Scalar,
    StateDescription,
    Unused,
    VariableArray,
    VariableBuffer,
)
from stillframe.vmstate.wire import SectionType

_U32 = Struct(">I")


def save_state(description: StateDescription, device: Any) -> bytes:
    """The payload of the device's section.

    Raises:
        InternalError: an attribute is missing or does not fit its field: a bug of the device.
    """
    return encode_state(description, device)[0]


def describe_state(description: StateDescription, device: Any) -> dict[str, Any]:
    """What :func:`save_state` would write now, as an entry of QEMU's vmdescription.

    It has the keys ``vmsd_name``, ``version``, ``fields`` and, if there are any,
    ``subsections``. Raises as :func:`save_state`.
    """
    return encode_state(description, device)[1]


def encode_state(
    description: StateDescription, device: Any, *, idstr: str | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Payload and description, from one look at the device.

    Args:
        idstr: the section's name for errors, if it is not the description's.

    Raises:
        InternalError: as :func:`save_state`.
    """
    encoder = _Encoder(idstr or description.name)
    entry = encoder.state(description, device, "")
    return b"".join(encoder.parts), entry


class _Encoder:
    """Writes states one after the other, with an account of their sizes."""

    def __init__(self, idstr: str) -> None:
        self.parts: list[bytes] = []
        self._size = 0
        self._idstr = idstr

    def state(self, description: StateDescription, device: Any, path: str) -> dict[str, Any]:
        """Write fields and subsections; gives their description."""
        if description.pre_save is not None:
            description.pre_save(device)
        entries: list[dict[str, Any]] = []
        for place, field in enumerate(description.fields):
            if field.present(device, description.version_id):
                self._field(field, described_name(description, place), device, path, entries)
        entry: dict[str, Any] = {
            "vmsd_name": description.name,
            "version": description.version_id,
            "fields": entries,
        }
        described = [
            self._subsection(subsection, device, path)
            for subsection in description.subsections
            if subsection.needed is None or subsection.needed(device)
        ]
        if described:
            entry["subsections"] = described
        return entry

    def _subsection(self, description: StateDescription, device: Any, path: str) -> dict[str, Any]:
        name = encode_name(description.name)
        self._add(
            b"".join(
                (
                    bytes((SectionType.SUBSECTION, len(name))),
                    name,
                    _U32.pack(description.version_id),
                )
            )
        )
        return self.state(description, device, path)

    def _add(self, data: bytes) -> None:
        self.parts.append(data)
        self._size += len(data)

    def _field(
        self, field: Field, name: str, device: Any, path: str, entries: list[dict[str, Any]]
    ) -> None:
        where = f"{path}{field.name}"
        kind = field.kind
        if isinstance(kind, Unused):
            self._add(bytes(kind.length_bytes))
            entries.append({"name": name, "type": "unused_buffer", "size": kind.length_bytes})
            return
        try:
            value = getattr(device, field.name)
        except AttributeError as error:
            raise self._bad(where, str(error)) from error
        match kind:
            case Scalar():
                self._numbers(kind, (value,), where)
                entries.append({"name": name, "type": kind.type_name, "size": kind.size_bytes})
            case Buffer() | VariableBuffer():
                length_bytes = (
                    kind.length_bytes
                    if isinstance(kind, Buffer)
                    else self._length(device, kind.length_field, kind.limit_bytes, where)
                )
                data = self._bytes(value, where)
                self._check_length(len(data), length_bytes, where)
                self._add(data)
                entries.append({"name": name, "type": "buffer", "size": length_bytes})
            case Array() | VariableArray():
                count = (
                    kind.count
                    if isinstance(kind, Array)
                    else self._length(device, kind.count_field, kind.limit, where)
                )
                self._check_length(len(value), count, where)
                self._numbers(kind.element, value, where)
                entries.extend(
                    array_entries(
                        name,
                        count,
                        {"type": kind.element.type_name, "size": kind.element.size_bytes},
                        compress=field.exists is None,
                    )
                )
            case Embedded():
                entries.append(self._embedded(kind.description, value, name, {}, where))
            case EmbeddedArray():
                self._check_length(len(value), kind.count, where)
                self._embedded_array(field, kind, value, name, where, entries)

    def _embedded(
        self,
        description: StateDescription,
        device: Any,
        name: str,
        place: dict[str, int],
        where: str,
    ) -> dict[str, Any]:
        start = self._size
        inner = self.state(description, device, f"{where}.")
        return {
            "name": name,
            **place,
            "type": "struct",
            "struct": inner,
            "size": self._size - start,
        }

    def _embedded_array(
        self,
        field: Field,
        kind: EmbeddedArray,
        devices: Sequence[Any],
        name: str,
        where: str,
        entries: list[dict[str, Any]],
    ) -> None:
        compress = can_compress(field)
        for index, device in enumerate(devices):
            place: dict[str, int] = {}
            if kind.count > 1:
                place = {"array_len": kind.count} if compress else {"index": index}
            entry = self._embedded(kind.description, device, name, place, f"{where}[{index}]")
            if index == 0 or not compress:
                entries.append(entry)

    def _numbers(self, kind: Scalar, values: Sequence[Any], where: str) -> None:
        try:
            self._add(Struct(f">{len(values)}{kind.code}").pack(*values))
        except (struct_error, TypeError) as error:
            raise self._bad(where, str(error)) from error

    def _bytes(self, value: Any, where: str) -> bytes:
        try:
            return bytes(memoryview(value))
        except TypeError as error:
            raise self._bad(where, str(error)) from error

    def _length(self, device: Any, length_field: str, limit: int, where: str) -> int:
        length = int(getattr(device, length_field))
        if length > limit:
            raise self._bad(where, f"{length} are more than {limit}")
        return length

    def _check_length(self, actual: int, expected: int, where: str) -> None:
        if actual != expected:
            raise self._bad(where, f"it has {actual} and not {expected}")

    def _bad(self, where: str, why: str) -> InternalError:
        return InternalError(f"field '{where}' of device '{self._idstr}' cannot be saved", why=why)


def array_entries(
    name: str, count: int, element: dict[str, Any], *, compress: bool
) -> list[dict[str, Any]]:
    """The entries of an array of numbers: one for all, or one for each."""
    if count == 0:
        return []
    if count == 1:
        return [{"name": name, **element}]
    if compress:
        return [{"name": name, "array_len": count, **element}]
    return [{"name": name, "index": index, **element} for index in range(count)]


def can_compress(field: Field) -> bool:
    """Whether all elements of an array have the same description (``vmsd_can_compress``)."""
    if field.exists is not None:
        return False
    if isinstance(field.kind, Embedded | EmbeddedArray):
        description = field.kind.description
        return not description.subsections and all(map(can_compress, description.fields))
    return True


def described_name(description: StateDescription, place: int) -> str:
    """The field's name, with a number if others have the same (``vmfield_name_num``)."""
    name = description.fields[place].name
    same = [at for at, field in enumerate(description.fields) if field.name == name]
    return name if len(same) == 1 else f"{name}[{same.index(place)}]"
