"""Values from a reply, whose shape no VMM guarantees."""

from __future__ import annotations

from collections.abc import Mapping


def as_map(value: object) -> Mapping[str, object]:
    """Return a value that ought to be an object; an empty one if it is not."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[object]:
    """Return a value that ought to be a list; an empty one if it is not."""
    return value if isinstance(value, list) else []


def as_int(value: object) -> int:
    """Return a value that ought to be an integer; 0 if it is not."""
    return value if isinstance(value, int) else 0
