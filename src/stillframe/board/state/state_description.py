"""The types that declare a device's state: kinds of fields, fields, and descriptions.

Source: QEMU ``include/migration/vmstate.h`` (``VMStateField``, ``VMStateDescription``).
The functions that make fields are in :mod:`stillframe.board.state.fields`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import msgspec

from stillframe.errors import UsageError
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.footers import VERSION_LIMIT

Exists: TypeAlias = Callable[[Any, int], bool]


class Scalar(msgspec.Struct, frozen=True, eq=False):
    """A big-endian number of fixed size.

    ``type_name``: QEMU's name. ``code``: the format character of :mod:`struct`.
    """

    type_name: str
    code: str
    size_bytes: int
    signed: bool = False


class Buffer(msgspec.Struct, frozen=True, eq=False):
    """A fixed number of bytes."""

    length_bytes: int


class VariableBuffer(msgspec.Struct, frozen=True, eq=False):
    """Bytes, as many as an earlier field says."""

    length_field: str
    limit_bytes: int


class Array(msgspec.Struct, frozen=True, eq=False):
    """A fixed number of numbers."""

    element: Scalar
    count: int


class VariableArray(msgspec.Struct, frozen=True, eq=False):
    """Numbers, as many as an earlier field says."""

    element: Scalar
    count_field: str
    limit: int


class Embedded(msgspec.Struct, frozen=True, eq=False):
    """The state of another object, inline."""

    description: StateDescription


class EmbeddedArray(msgspec.Struct, frozen=True, eq=False):
    """The states of a fixed number of other objects, inline."""

    description: StateDescription
    count: int


class Unused(msgspec.Struct, frozen=True, eq=False):
    """Zeroes, which the loader skips."""

    length_bytes: int


Kind: TypeAlias = (
    Scalar | Buffer | VariableBuffer | Array | VariableArray | Embedded | EmbeddedArray | Unused
)


class Field(msgspec.Struct, frozen=True, eq=False):
    """One field of a description; made by the functions in :mod:`stillframe.board.state.fields`.

    ``since``: the first version that has it. ``exists``: if given, must return True too; takes the
    device, as loaded or saved so far, and the version.
    """

    name: str
    kind: Kind
    since: int = 0
    exists: Exists | None = None

    def present(self, device: Any, version_id: int) -> bool:
        """Return whether a stream of this version has the field."""
        return self.since <= version_id and (self.exists is None or self.exists(device, version_id))


class StateDescription(msgspec.Struct, frozen=True, eq=False):
    """The layout of a device's state: QEMU's ``VMStateDescription``.

    ``fields``: in stream order. ``version_id``: the version written, and the newest that loads.
    ``minimum_version_id``: the oldest version that loads. ``subsections``: parts written only when
    their ``needed`` returns True; a reader that does not know one refuses the stream. ``needed``:
    None means always; if that of a device's own description returns False, the device has no
    section. ``pre_save`` and ``pre_load`` run before the first field, ``post_load`` (which gets the
    loaded version) after the last subsection; it raises ValueError for an impossible state.

    Raises:
        UsageError: the declaration contradicts itself.
    """

    name: str
    version_id: int
    minimum_version_id: int
    fields: tuple[Field, ...]
    subsections: tuple[StateDescription, ...] = ()
    needed: Callable[[Any], bool] | None = None
    pre_save: Callable[[Any], None] | None = None
    pre_load: Callable[[Any], None] | None = None
    post_load: Callable[[Any, int], None] | None = None

    def __post_init__(self) -> None:
        encode_name(self.name)
        if not 0 <= self.minimum_version_id <= self.version_id <= VERSION_LIMIT:
            raise UsageError(
                f"state '{self.name}' has versions {self.minimum_version_id} to {self.version_id}"
            )
        numbers: set[str] = set()
        for field in self.fields:
            self._check_field(field, numbers)
            if isinstance(field.kind, Scalar) and field.kind.code in "BHIQ":
                numbers.add(field.name)
        self._check_subsections()

    def _check_field(self, field: Field, numbers: set[str]) -> None:
        where = f"field '{field.name}' of state '{self.name}'"
        if field.since > self.version_id:
            raise UsageError(f"{where} is newer than the state's version {self.version_id}")
        kind = field.kind
        earlier: str | None = None
        if isinstance(kind, VariableBuffer):
            earlier = kind.length_field
        elif isinstance(kind, VariableArray):
            earlier = kind.count_field
        if earlier is not None and earlier not in numbers:
            raise UsageError(f"{where} takes its length from '{earlier}', no number before it")

    def _check_subsections(self) -> None:
        names = [subsection.name for subsection in self.subsections]
        if len(set(names)) != len(names):
            raise UsageError(f"two subsections of state '{self.name}' have the same name")
        embedded = [
            field.kind.description.name
            for field in self.fields
            if isinstance(field.kind, Embedded | EmbeddedArray)
        ]
        for name in names:
            if not name.startswith(f"{self.name}/"):
                raise UsageError(f"subsection '{name}' must be called '{self.name}/...'")
            for inner in embedded:
                # The reader of the embedded structure would take it for one of its own.
                if name.startswith(f"{inner}/"):
                    raise UsageError(f"subsection '{name}' looks like one of structure '{inner}'")


def scalar(type_name: str, code: str) -> Scalar:
    """Return the scalar kind for a format character."""
    return Scalar(type_name, code, struct.calcsize(f">{code}"), code.islower())


@lru_cache(maxsize=1024)
def array_layout(kind: Scalar, count: int) -> struct.Struct:
    """Return the packer of ``count`` numbers."""
    return struct.Struct(f">{count}{kind.code}")
