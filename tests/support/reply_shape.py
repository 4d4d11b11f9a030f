"""How two answers of QMP servers differ: names and types of members, not what they say."""

from __future__ import annotations

from collections.abc import Iterator


def differences(theirs: object, ours: object, place: str = "") -> set[str]:
    """``missing PLACE``, ``more PLACE`` and ``type PLACE``; a list counts by its first element."""
    return set(_differences(theirs, ours, place))


def _differences(theirs: object, ours: object, place: str) -> Iterator[str]:
    if type(theirs) is not type(ours):
        yield f"type {place}: {type(theirs).__name__}, ours {type(ours).__name__}"
    elif isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs.keys() | ours.keys():
            inner = f"{place}.{name}"
            if name not in ours:
                yield f"missing {inner}"
            elif name not in theirs:
                yield f"more {inner}"
            else:
                yield from _differences(theirs[name], ours[name], inner)
    elif isinstance(theirs, list) and isinstance(ours, list):
        if bool(theirs) != bool(ours):
            yield f"type {place}: {len(theirs)} elements, ours {len(ours)}"
        elif theirs:
            yield from _differences(theirs[0], ours[0], f"{place}[]")
