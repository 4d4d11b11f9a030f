"""The declaration of a device's state in QEMU's encoding, to save, load and describe it.

::

    TIMER = StateDescription(
        name="timer",
        version_id=2,
        minimum_version_id=1,
        fields=(u64("interval_ns"), u8("mode"), boolean("armed", since=2)),
    )
    payload = save_state(TIMER, device)

A field stands for the device's attribute of the same name. A load fills mutable values (lists,
bytearrays) in place and replaces others. See ``docs/reference/device-state.md``.

Source: QEMU ``include/migration/vmstate.h``, ``migration/vmstate.c``.
"""

from __future__ import annotations

from typing import Protocol

from stillframe.board.state.state_decoder import load_state
from stillframe.board.state.state_description import (
    Array,
    Buffer,
    Embedded,
    EmbeddedArray,
    Exists,
    Field,
    Kind,
    Scalar,
    StateDescription,
    Unused,
    VariableArray,
    VariableBuffer,
    scalar,
)
from stillframe.board.state.state_encoder import describe_state, save_state
from stillframe.errors import UsageError

__all__ = [
    "Field",
    "StateDescription",
    "array",
    "boolean",
    "buffer",
    "describe_state",
    "i32",
    "i64",
    "load_state",
    "save_state",
    "struct",
    "struct_array",
    "u8",
    "u16",
    "u32",
    "u64",
    "unused",
    "variable_array",
    "variable_buffer",
]

LENGTH_LIMIT_BYTES = 64 << 20
"""The longest field: a device's state is held in memory."""


class ScalarFunction(Protocol):
    """A function that makes the field of a number or bool."""

    def __call__(self, name: str, *, since: int = 0, exists: Exists | None = None) -> Field:
        """
        Args:
            name: the device's attribute.
            since: the first version that has the field.
            exists: takes the device and the version; the field exists only if it returns True too.
        """


def _numbers(type_name: str, code: str) -> ScalarFunction:
    kind = scalar(type_name, code)

    def make(name: str, *, since: int = 0, exists: Exists | None = None) -> Field:
        return _field(name, kind, since, exists)

    return make


u8 = _numbers("uint8", "B")
u16 = _numbers("uint16", "H")
u32 = _numbers("uint32", "I")
u64 = _numbers("uint64", "Q")
i32 = _numbers("int32", "i")
i64 = _numbers("int64", "q")
boolean = _numbers("bool", "?")


def buffer(name: str, length_bytes: int, *, since: int = 0, exists: Exists | None = None) -> Field:
    """Declare bytes of a fixed length."""
    _check_length(name, length_bytes)
    return _field(name, Buffer(length_bytes), since, exists)


def variable_buffer(
    name: str,
    length_field: str,
    *,
    limit_bytes: int,
    since: int = 0,
    exists: Exists | None = None,
) -> Field:
    """Declare bytes, as many as an earlier unsigned field says.

    Args:
        length_field: that field's name. On save, the two attributes must agree.
        limit_bytes: the maximum; a stream that claims more is refused before any allocation.
    """
    _check_length(name, limit_bytes)
    return _field(name, VariableBuffer(length_field, limit_bytes), since, exists)


def array(
    name: str,
    element: ScalarFunction,
    count: int,
    *,
    since: int = 0,
    exists: Exists | None = None,
) -> Field:
    """Declare a list or tuple of ``count`` numbers: ``array("regs", u64, 16)``."""
    kind = _scalar_kind(name, element)
    _check_length(name, count * kind.size_bytes)
    return _field(name, Array(kind, count), since, exists)


def variable_array(
    name: str,
    element: ScalarFunction,
    count_field: str,
    *,
    limit: int,
    since: int = 0,
    exists: Exists | None = None,
) -> Field:
    """Declare a list or tuple of at most ``limit`` numbers, counted by an earlier field."""
    kind = _scalar_kind(name, element)
    _check_length(name, limit * kind.size_bytes)
    return _field(name, VariableArray(kind, count_field, limit), since, exists)


def struct(
    name: str, description: StateDescription, *, since: int = 0, exists: Exists | None = None
) -> Field:
    """Declare the state of the object in attribute ``name``, inline; it is loaded in place."""
    return _field(name, Embedded(description), since, exists)


def struct_array(
    name: str,
    description: StateDescription,
    count: int,
    *,
    since: int = 0,
    exists: Exists | None = None,
) -> Field:
    """Declare the states of the ``count`` objects in sequence attribute ``name``, inline."""
    if not 0 < count <= LENGTH_LIMIT_BYTES:
        raise UsageError(f"field '{name}' cannot have {count} structures")
    return _field(name, EmbeddedArray(description, count), since, exists)


def unused(length_bytes: int, *, since: int = 0, exists: Exists | None = None) -> Field:
    """Declare bytes that once were a field: saved as zeroes, skipped on load."""
    _check_length("unused", length_bytes)
    return _field("unused", Unused(length_bytes), since, exists)


def _field(name: str, kind: Kind, since: int, exists: Exists | None) -> Field:
    if not name or since < 0:
        raise UsageError(f"field '{name}' cannot be there since version {since}")
    return Field(name, kind, since, exists)


def _scalar_kind(name: str, element: ScalarFunction) -> Scalar:
    kind = element(name).kind
    if not isinstance(kind, Scalar):
        raise UsageError(f"the elements of array '{name}' must be numbers")
    return kind


def _check_length(name: str, length_bytes: int) -> None:
    if not 0 < length_bytes <= LENGTH_LIMIT_BYTES:
        raise UsageError(f"field '{name}' cannot have {length_bytes} bytes")
