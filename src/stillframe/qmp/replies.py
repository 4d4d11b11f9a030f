"""Values out of a reply, whose shape a VMM does not promise."""

from __future__ import annotations

from collections.abc import Mapping


def as_map(value: object) -> Mapping[str, object]:
    """A reply that ought to be an object; an empty one if it is not."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[object]:
    """A reply that ought to be a list; an empty one if it is not."""
    return value if isinstance(value, list) else []


def as_int(value: object) -> int:
    """A reply that ought to be a number; 0 if it is not."""
    return value if isinstance(value, int) else 0
