"""What of a description can be worked out before a device is saved: it counts in the downtime.

Neighbouring numbers that are always there are packed in one call. The names are those of the
vmdescription (QEMU ``migration/vmstate.c``: ``vmfield_name_num``, ``vmsd_can_compress``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from struct import Struct
from typing import Any, TypeAlias

import msgspec

from stillframe.vmstate.state_description import (
    Embedded,
    EmbeddedArray,
    Field,
    Scalar,
    StateDescription,
)

JsonObject: TypeAlias = dict[str, Any]


class NumberRun(msgspec.Struct, frozen=True, eq=False):
    """Numbers that are always there, one after the other.

    ``get``: their values from the device. ``entries``: their description.
    """

    fields: tuple[Field, ...]
    get: Callable[[Any], Sequence[Any]]
    layout: Struct
    entries: tuple[JsonObject, ...]


class FieldStep(msgspec.Struct, frozen=True, eq=False):
    """Any other field.

    ``name``: its name in the vmdescription. ``compress``: whether one entry there stands for
    all elements of an array.
    """

    field: Field
    name: str
    compress: bool


Step: TypeAlias = NumberRun | FieldStep


@lru_cache(maxsize=1024)
def plan(description: StateDescription) -> tuple[Step, ...]:
    """The steps of saving a state's fields, in order."""
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


@lru_cache(maxsize=1024)
def array_layout(kind: Scalar, count: int) -> Struct:
    """How so many numbers are packed."""
    return Struct(f">{count}{kind.code}")


def scalar_entry(name: str, kind: Scalar) -> JsonObject:
    """A number's entry in the vmdescription."""
    return {"name": name, "type": kind.type_name, "size": kind.size_bytes}


def _number_run(run: Sequence[tuple[Field, Scalar, str]]) -> NumberRun:
    names = [field.name for field, _, _ in run]
    # With one name attrgetter gives no tuple, with a dot it would go deeper.
    several = len(names) > 1 and all(name.isidentifier() for name in names)
    return NumberRun(
        tuple(field for field, _, _ in run),
        attrgetter(*names) if several else lambda device: [getattr(device, n) for n in names],
        Struct(">" + "".join(kind.code for _, kind, _ in run)),
        tuple(scalar_entry(name, kind) for _, kind, name in run),
    )


def _described_names(description: StateDescription) -> list[str]:
    """The fields' names, with a number where several have the same."""
    names = [field.name for field in description.fields]
    return [
        name if names.count(name) == 1 else f"{name}[{names[:place].count(name)}]"
        for place, name in enumerate(names)
    ]


def _can_compress(field: Field) -> bool:
    """Whether all elements of an array have the same description."""
    if field.exists is not None:
        return False
    if isinstance(field.kind, Embedded | EmbeddedArray):
        description = field.kind.description
        return not description.subsections and all(map(_can_compress, description.fields))
    return True
