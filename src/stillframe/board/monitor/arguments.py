"""The parser of a command's JSON arguments, with QEMU's error messages.

Arguments are declared as a ``msgspec.Struct``; its ``rename`` gives their names on the wire. This
visitor exists because msgspec's messages differ from QEMU's (``qapi/qobject-input-visitor.c``,
``qapi/qapi-visit-core.c``). A member with a default may be left out, but not be null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, TypeGuard, TypeVar

import msgspec
from msgspec import inspect

from stillframe.qmp.errors import QmpError

Uint64 = Annotated[int, msgspec.Meta(extra={"bits": 64})]
"""QAPI's ``uint64``; a plain ``int`` is an ``int64``."""

Arguments = TypeVar("Arguments", bound=msgspec.Struct)

_INT64 = range(-(1 << 63), 1 << 63)
_UINT64_MAX = (1 << 64) - 1

_Reader = Callable[[object, str], object]
"""Takes a JSON value and its name, which may be a path, such as ``capabilities[0].state``."""


def reader_of(kind: type[Arguments]) -> Callable[[Mapping[str, object]], Arguments]:
    """Return a function that parses a command's arguments into this Struct or raises QmpError."""
    read = _struct_reader(inspect.type_info(kind))

    def read_arguments(given: Mapping[str, object]) -> Arguments:
        arguments = read(given, "")
        if not isinstance(arguments, kind):
            raise TypeError(kind)
        return arguments

    return read_arguments


def _reader(kind: inspect.Type) -> _Reader:
    match kind:
        case inspect.UnionType():
            # An optional member: its value must have its own type.
            sent = [
                one
                for one in kind.types
                if not isinstance(one, inspect.NoneType)
                and getattr(one, "cls", None) is not msgspec.UnsetType
            ]
            if len(sent) != 1:
                raise TypeError(f"no arguments of several types: {kind}")
            return _reader(sent[0])
        case inspect.StrType():
            return _read_text
        case inspect.BoolType():
            return _read_boolean
        case inspect.FloatType():
            return _read_number
        case inspect.IntType():
            return _read_integer
        case inspect.Metadata(type=inspect.IntType(), extra={"bits": int(bits)}):
            return _unsigned_reader(bits)
        case inspect.LiteralType():
            return _word_reader(tuple(str(value) for value in kind.values))
        case inspect.ListType():
            return _list_reader(kind.item_type)
        case inspect.StructType():
            return _struct_reader(kind)
        case inspect.AnyType():
            return lambda value, _name: value
    raise TypeError(f"no arguments of this type: {kind}")


def _struct_reader(kind: inspect.Type) -> _Reader:
    if not isinstance(kind, inspect.StructType):
        raise TypeError(f"arguments are declared as a Struct: {kind}")
    cls = kind.cls
    members = [
        (field.encode_name, field.name, field.required, _reader(field.type))
        for field in kind.fields
    ]
    known = {member[0] for member in members}

    def read(value: object, name: str) -> object:
        if not isinstance(value, Mapping):
            raise _wrong_type(name, "object")
        dot = f"{name}." if name else ""
        values: dict[str, object] = {}
        for sent_name, attribute, required, read_member in members:
            if sent_name in value:
                values[attribute] = read_member(value[sent_name], dot + sent_name)
            elif required:
                raise QmpError(f"Parameter '{dot}{sent_name}' is missing")
        for sent_name in value:
            if sent_name not in known:
                raise QmpError(f"Parameter '{dot}{sent_name}' is unexpected")
        return cls(**values)

    return read


def _list_reader(item: inspect.Type) -> _Reader:
    read_item = _reader(item)

    def read(value: object, name: str) -> object:
        if not isinstance(value, list):
            raise _wrong_type(name, "array")
        return [read_item(one, f"{name}[{index}]") for index, one in enumerate(value)]

    return read


def _word_reader(words: tuple[str, ...]) -> _Reader:
    def read(value: object, name: str) -> object:
        text = _read_text(value, name)
        if text not in words:
            raise QmpError(f"Parameter '{_own_name(name)}' does not accept value '{text}'")
        return text

    return read


def _unsigned_reader(bits: int) -> _Reader:
    def read(value: object, name: str) -> object:
        if not _is_integer(value) or not _INT64.start <= value <= _UINT64_MAX:
            raise QmpError(f"Parameter '{name}' expects uint64")
        # QEMU reads a negative number as its two's complement.
        number = value & _UINT64_MAX
        if number >> bits:
            raise QmpError(f"Parameter '{_own_name(name)}' expects uint{bits}_t")
        return number

    return read


def _read_integer(value: object, name: str) -> object:
    if not _is_integer(value) or value not in _INT64:
        raise _wrong_type(name, "integer")
    return value


def _read_number(value: object, name: str) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "number")
    return float(value)


def _read_boolean(value: object, name: str) -> object:
    if not isinstance(value, bool):
        raise _wrong_type(name, "boolean")
    return value


def _read_text(value: object, name: str) -> object:
    if not isinstance(value, str):
        raise _wrong_type(name, "string")
    return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _own_name(name: str) -> str:
    """Return the last part of a path; QEMU calls an element of a list ``null``."""
    return "null" if name.endswith("]") else name.rpartition(".")[2]


def _wrong_type(name: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{name}', expected: {expected}")
