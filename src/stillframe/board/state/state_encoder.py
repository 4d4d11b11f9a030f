"""The saver of a device's declared state, which also describes what it saved.

Saving is part of the downtime, so ``plan`` works out in advance what depends only on the
description: neighbouring numbers that are always present are packed in one call.
Source: QEMU ``migration/vmstate.c``: ``vmstate_save_state_v``, ``vmstate_subsection_save``,
``vmsd_desc_field_start``, ``vmfield_name_num``, ``vmsd_can_compress``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from struct import Struct
from struct import error as struct_error
from typing import Any, TypeAlias

import msgspec

from stillframe.board.state.state_description import (
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
    array_layout,
)
from stillframe.errors import DataError, InternalError
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.wire import SectionType

_U32 = Struct(">I")

JsonObject: TypeAlias = dict[str, Any]


class NumberRun(msgspec.Struct, frozen=True, eq=False):
    """Consecutive numbers that are always present.

    ``get``: returns their values from the device. ``entries``: their vmdescription entries.
    """

    fields: tuple[Field, ...]
    get: Callable[[Any], Sequence[Any]]
    layout: Struct
    entries: tuple[JsonObject, ...]


class FieldStep(msgspec.Struct, frozen=True, eq=False):
    """Any other field.

    ``name``: its name in the vmdescription. ``compress``: whether a single entry there stands for
    all elements of an array.
    """

    field: Field
    name: str
    compress: bool


Step: TypeAlias = NumberRun | FieldStep


@lru_cache(maxsize=1024)
def plan(description: StateDescription) -> tuple[Step, ...]:
    """Return the steps that save a state's fields, in order."""
    steps: list[Step] = []
    run: list[tuple[Field, Scalar, str]] = []
    for field, name in zip(description.fields, _described_names(description), strict=True):
        if isinstance(field.kind, Scalar) and field.exists is None:
            run.append((field, field.kind, name))
            continue
        if run:
            steps.append(_number_run(run))
            run = []
        steps.append(FieldStep(field, name, _can_compress(field)))
    if run:
        steps.append(_number_run(run))
    return tuple(steps)


def scalar_entry(name: str, kind: Scalar) -> JsonObject:
    """Return a number's vmdescription entry."""
    return {"name": name, "type": kind.type_name, "size": kind.size_bytes}


def _number_run(run: Sequence[tuple[Field, Scalar, str]]) -> NumberRun:
    names = [field.name for field, _, _ in run]
    # attrgetter returns no tuple for one name, and follows dots in a name.
    several = len(names) > 1 and all(name.isidentifier() for name in names)
    return NumberRun(
        tuple(field for field, _, _ in run),
        attrgetter(*names) if several else lambda device: [getattr(device, n) for n in names],
        Struct(">" + "".join(kind.code for _, kind, _ in run)),
        tuple(scalar_entry(name, kind) for _, kind, name in run),
    )


def _described_names(description: StateDescription) -> list[str]:
    """Return the fields' names, with an index where several are the same."""
    names = [field.name for field in description.fields]
    return [
        name if names.count(name) == 1 else f"{name}[{names[:place].count(name)}]"
        for place, name in enumerate(names)
    ]


def _can_compress(field: Field) -> bool:
    """Return whether all elements of an array have the same description."""
    if field.exists is not None:
        return False
    if isinstance(field.kind, Embedded | EmbeddedArray):
        description = field.kind.description
        return not description.subsections and all(map(_can_compress, description.fields))
    return True


def save_state(description: StateDescription, device: Any) -> bytes:
    """Return the payload of the device's section.

    Raises:
        InternalError: an attribute is missing or does not fit its field: a bug in the device.
        DataError: the payload is ambiguous, see :func:`encode_state`.
    """
    return encode_state(description, device)[0]


def describe_state(description: StateDescription, device: Any) -> JsonObject:
    """Return what :func:`save_state` would write now, as an entry of QEMU's vmdescription.

    Its keys are ``vmsd_name``, ``version``, ``fields`` and, if there are any, ``subsections``.
    Raises the errors of :func:`save_state`.
    """
    return encode_state(description, device)[1]


def encode_state(
    description: StateDescription, device: Any, *, idstr: str | None = None
) -> tuple[bytes, JsonObject]:
    """Return payload and description, from a single read of the device.

    Args:
        idstr: the section's name in errors, if not the description's.

    Raises:
        InternalError: as :func:`save_state`.
        DataError: the bytes after an embedded structure with subsections look like one of them and
            would be loaded as one; the guest may have put them there.
    """
    encoder = _Encoder(idstr or description.name)
    entry = encoder.state(description, device, "")
    return encoder.payload(), entry


class _Encoder:
    """The encoder of one payload, which also counts its size."""

    def __init__(self, idstr: str) -> None:
        self._idstr = idstr
        self._parts: list[bytes] = []
        self._size = 0
        self._struct_ends: list[tuple[int, str]] = []

    def payload(self) -> bytes:
        """Return the payload, unless it is ambiguous."""
        payload = b"".join(self._parts)
        for end, name in self._struct_ends:
            prefix = f"{name}/".encode("ascii")
            if (
                payload[end : end + 1] == bytes((SectionType.SUBSECTION,))
                and payload[end + 1 : end + 2] > bytes((len(prefix),))
                and payload.startswith(prefix, end + 2)
            ):
                raise DataError(
                    f"the state of device '{self._idstr}' can be read in more than one way",
                    why=f"what follows structure '{name}' looks like a subsection of it",
                    remedy="take another snapshot a moment later",
                )
        return payload

    def state(self, description: StateDescription, device: Any, path: str) -> JsonObject:
        """Write fields and subsections and return their description."""
        if description.pre_save is not None:
            description.pre_save(device)
        entries: list[JsonObject] = []
        for step in plan(description):
            if isinstance(step, NumberRun):
                self._number_run(step, device, path)
                entries.extend(entry.copy() for entry in step.entries)
            elif step.field.present(device, description.version_id):
                self._field(step, device, f"{path}{step.field.name}", entries)
        described: JsonObject = {
            "vmsd_name": description.name,
            "version": description.version_id,
            "fields": entries,
        }
        subsections = [
            self._subsection(subsection, device, path)
            for subsection in description.subsections
            if subsection.needed is None or subsection.needed(device)
        ]
        if subsections:
            described["subsections"] = subsections
        return described

    def _subsection(self, description: StateDescription, device: Any, path: str) -> JsonObject:
        name = encode_name(description.name)
        self._add(bytes((SectionType.SUBSECTION, len(name))) + name)
        self._add(_U32.pack(description.version_id))
        return self.state(description, device, path)

    def _number_run(self, run: NumberRun, device: Any, path: str) -> None:
        try:
            self._add(run.layout.pack(*run.get(device)))
        except (AttributeError, TypeError, struct_error):
            # Find the field that failed.
            for field in run.fields:
                where = f"{path}{field.name}"
                if isinstance(field.kind, Scalar):
                    self._numbers(field.kind, (self._value(device, field, where),), where)
            raise

    def _field(self, step: FieldStep, device: Any, where: str, entries: list[JsonObject]) -> None:
        name = step.name
        kind = step.field.kind
        if isinstance(kind, Unused):
            self._add(bytes(kind.length_bytes))
            entries.append({"name": name, "type": "unused_buffer", "size": kind.length_bytes})
            return
        value = self._value(device, step.field, where)
        match kind:
            case Scalar():
                self._numbers(kind, (value,), where)
                entries.append(scalar_entry(name, kind))
            case Buffer():
                self._buffer(value, kind.length_bytes, where)
                entries.append({"name": name, "type": "buffer", "size": kind.length_bytes})
            case VariableBuffer():
                length_bytes = self._length(device, kind.length_field, kind.limit_bytes, where)
                self._buffer(value, length_bytes, where)
                entries.append({"name": name, "type": "buffer", "size": length_bytes})
            case Array():
                self._array(step, kind.element, value, kind.count, where, entries)
            case VariableArray():
                count = self._length(device, kind.count_field, kind.limit, where)
                self._array(step, kind.element, value, count, where, entries)
            case Embedded():
                entries.append(self._embedded(kind.description, value, name, {}, where))
            case EmbeddedArray():
                self._embedded_array(step, kind, value, where, entries)

    def _value(self, device: Any, field: Field, where: str) -> Any:
        try:
            return getattr(device, field.name)
        except AttributeError as error:
            raise self._bad(where, str(error)) from error

    def _numbers(self, kind: Scalar, values: Sequence[Any], where: str) -> None:
        try:
            self._add(array_layout(kind, len(values)).pack(*values))
        except (TypeError, struct_error) as error:
            raise self._bad(where, str(error)) from error

    def _buffer(self, value: Any, length_bytes: int, where: str) -> None:
        try:
            data = bytes(memoryview(value))
        except TypeError as error:
            raise self._bad(where, str(error)) from error
        self._check_count(data, length_bytes, where)
        self._add(data)

    def _array(
        self,
        step: FieldStep,
        element: Scalar,
        values: Any,
        count: int,
        where: str,
        entries: list[JsonObject],
    ) -> None:
        self._check_count(values, count, where)
        self._numbers(element, values, where)
        if count == 0:
            return
        type_size = {"type": element.type_name, "size": element.size_bytes}
        entries.extend(
            {"name": step.name, **place, **type_size}
            for place in _places(count, compress=step.compress)
        )

    def _embedded(
        self,
        description: StateDescription,
        device: Any,
        name: str,
        place: dict[str, int],
        where: str,
    ) -> JsonObject:
        start = self._size
        inner = self.state(description, device, f"{where}.")
        if description.subsections:
            self._struct_ends.append((self._size, description.name))
        return {
            "name": name,
            **place,
            "type": "struct",
            "struct": inner,
            "size": self._size - start,
        }

    def _embedded_array(
        self,
        step: FieldStep,
        kind: EmbeddedArray,
        devices: Any,
        where: str,
        entries: list[JsonObject],
    ) -> None:
        self._check_count(devices, kind.count, where)
        places = _places(kind.count, compress=step.compress)
        for index, device in enumerate(devices):
            place = places[min(index, len(places) - 1)]
            inner = f"{where}[{index}]"
            entry = self._embedded(kind.description, device, step.name, place, inner)
            if index < len(places):
                entries.append(entry)

    def _length(self, device: Any, length_field: str, limit: int, where: str) -> int:
        length = int(getattr(device, length_field))
        if length > limit:
            raise self._bad(where, f"'{length_field}' is {length}, at most {limit} are possible")
        return length

    def _check_count(self, value: Any, expected: int, where: str) -> None:
        try:
            count = len(value)
        except TypeError as error:
            raise self._bad(where, str(error)) from error
        if count != expected:
            raise self._bad(where, f"there are {count}, and not {expected}")

    def _add(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)

    def _bad(self, where: str, why: str) -> InternalError:
        return InternalError(f"field '{where}' of device '{self._idstr}' cannot be saved", why=why)


def _places(count: int, *, compress: bool) -> list[dict[str, int]]:
    """Return the keys that place an array's entries: one for all elements, or one for each."""
    if count == 1:
        return [{}]
    if compress:
        return [{"array_len": count}]
    return [{"index": index} for index in range(count)]
