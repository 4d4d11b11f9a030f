"""The value of one QEMU option, open for changes: ``a=b,c=d`` or a JSON object.

What is not changed comes out as it went in. Syntax: QEMU ``util/keyval.c``, ``util/qemu-option.c``.
"""

from __future__ import annotations

import json as _json
from collections.abc import Iterator
from typing import Any

from stillframe.errors import DataError

_ON = frozenset({"on", "yes", "y", "true"})


def read_json(text: str) -> Any:
    """Parse the JSON of an option.

    Raises:
        ValueError: malformed, or with a text that QEMU has none of: a NUL, or half of a surrogate
            pair. RecursionError: nested too deeply.
    """
    value = _json.loads(text)
    if b"\\u0000" in _json.dumps(value, ensure_ascii=False).encode():
        raise ValueError("it has a NUL character")
    return value


def split_commas(text: str) -> list[str]:
    """Return the parts between single commas, raw; a doubled comma belongs to its part."""
    parts: list[str] = []
    start = position = 0
    while position < len(text):
        if text[position] != ",":
            position += 1
        elif text[position + 1 : position + 2] == ",":
            position += 2
        else:
            parts.append(text[start:position])
            start = position = position + 1
    return [*parts, text[start:]] if text else []


def escape_commas(text: str) -> str:
    """Return ``text`` as a value, its commas doubled."""
    return text.replace(",", ",,")


class OptionValue:
    """One value. Keys of nested JSON objects are joined by dots, as in QEMU.

    Args:
        implied: the key of a first part without ``=``, such as ``driver``.
        json: a value that starts with a brace is JSON.

    Raises:
        DataError: malformed JSON.
    """

    def __init__(self, text: str, implied: str, *, json: bool = True) -> None:
        self._implied = implied
        self._json: dict[str, Any] | None = None
        self._parts: list[str] = []
        if json and text.startswith("{"):
            try:
                self._json = read_json(text)
            except (ValueError, RecursionError) as error:
                raise DataError("an option's JSON is malformed", why=str(error)) from error
        else:
            self._parts = split_commas(text)

    @property
    def is_json(self) -> bool:
        return self._json is not None

    @property
    def text(self) -> str:
        """The value as QEMU takes it."""
        if self._json is not None:
            return _json.dumps(self._json, separators=(",", ":"))
        return ",".join(self._parts)

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield all (key, value), flat; a part without ``=`` is ``on``."""
        if self._json is not None:
            yield from _flatten(self._json, "", 0)
            return
        for index, part in enumerate(self._parts):
            key, equals, value = part.partition("=")
            if equals:
                yield key, value.replace(",,", ",")
            elif index == 0 and self._implied:
                yield self._implied, part.replace(",,", ",")
            else:
                yield key, "on"

    def bare(self) -> set[str]:
        """Return the keys without ``=``. QEMU may take the first one as the value of an implied
        key, whatever we know of it."""
        parts = self._parts[1:] if self._implied else self._parts
        return {part for part in parts if "=" not in part}

    def get(self, key: str, default: str = "") -> str:
        """Return the last value of ``key``: in QEMU, the last one wins."""
        found = default
        for name, value in self.items():
            if name == key:
                found = value
        return found

    def all(self, key: str) -> list[str]:
        """Return every value of a key that may be repeated."""
        return [value for name, value in self.items() if name == key]

    def is_on(self, key: str) -> bool:
        return self.get(key).lower() in _ON

    def names(self) -> set[str]:
        """Return all keys, flat."""
        return {key for key, _ in self.items()}

    def drop(self, *keys: str) -> set[str]:
        """Remove keys, with all that is nested below them; return those that were there."""
        present = {key for key in keys if any(_is_below(name, key) for name in self.names())}
        if self._json is not None:
            for key in present:
                _drop_path(self._json, key)
        else:
            names = [key for key, _ in self.items()]
            self._parts = [
                part
                for name, part in zip(names, self._parts, strict=True)
                if not any(_is_below(name, key) for key in present)
            ]
        return present

    def append(self, key: str, text: str) -> None:
        """Add one more value of a key that may be repeated (a QAPI list of ``String``s)."""
        if self._json is not None:
            self._json.setdefault(key, []).append({"str": text})
        else:
            self._parts.append(f"{key}={escape_commas(text)}")

    def set(self, key: str, value: str | bool | int) -> None:
        """Give ``key`` this one value, in its place if it has one."""
        if self._json is not None:
            _set_path(self._json, key, value)
            return
        if isinstance(value, bool):
            value = "on" if value else "off"
        value = str(value)
        part = f"{key}={escape_commas(value)}"
        places = [index for index, (name, _) in enumerate(self.items()) if name == key]
        if not places:
            self._parts.append(part)
            return
        was_bare = "=" not in self._parts[places[0]]
        if was_bare and key == self._implied and "=" not in value:
            part = escape_commas(value)
        self._parts[places[0]] = part
        for place in reversed(places[1:]):
            del self._parts[place]


def _is_below(name: str, key: str) -> bool:
    return name == key or name.startswith(key + ".")


def _flatten(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > 32:
        raise DataError("an option's JSON is nested too deeply")
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(value, bool):
        yield prefix, "on" if value else "off"
    else:
        yield prefix, "" if value is None else str(value)


def _drop_path(tree: dict[str, Any], path: str) -> None:
    for key in [key for key in tree if _is_below(key, path)]:
        del tree[key]
    head, _, rest = path.partition(".")
    if rest and isinstance(tree.get(head), dict):
        _drop_path(tree[head], rest)


def _set_path(tree: dict[str, Any], path: str, value: str | bool | int) -> None:
    head, _, rest = path.partition(".")
    if rest and isinstance(tree.get(head), dict):
        _set_path(tree[head], rest, value)
    else:
        tree[path] = value
