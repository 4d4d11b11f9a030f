"""The options of a QEMU command line, one by one: parsed, changed, and written again.

Syntax: QEMU ``util/keyval.c``, ``util/qemu-option.c``; JSON for the options that take it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from stillframe.machine.qemu.command_line import WITHOUT_VALUE, key_values

_IMPLIED = {
    "device": "driver",
    "netdev": "type",
    "nic": "type",
    "chardev": "backend",
    "object": "qom-type",
    "blockdev": "driver",
    "smp": "cpus",
}
"""The key of a first part without ``=``."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option. ``name``: without dashes, empty for a bare disk image. ``words``: as written."""

    name: str
    value: str
    words: tuple[str, ...]

    @property
    def is_json(self) -> bool:
        return self.value.startswith("{")

    def fields(self) -> dict[str, str]:
        """Return its keys and values; keys of nested JSON are joined by dots."""
        if self.is_json:
            try:
                return _flat(json.loads(self.value))
            except (ValueError, RecursionError):
                return {}
        return key_values(self.value, _IMPLIED.get(self.name, ""))

    @property
    def identity(self) -> str:
        """Its ``id``, or the name of the block node that it makes."""
        return self.fields().get("node-name" if self.name == "blockdev" else "id", "")

    def changed(
        self, new: Mapping[str, object] | None = None, *, without: Iterable[str] = ()
    ) -> Option:
        """Return the option with ``new`` keys added or replaced, and ``without`` dropped with all
        below them."""
        gone = tuple(without)

        def stays(key: str) -> bool:
            return not any(key == name or key.startswith(f"{name}.") for name in gone)

        if self.is_json:
            tree = {key: value for key, value in json.loads(self.value).items() if stays(key)}
            return self._with(json.dumps(tree | dict(new or {}), separators=(",", ":")))
        fields: dict[str, object] = {k: v for k, v in self.fields().items() if stays(k)}
        return self._with(_text(fields | dict(new or {}), _IMPLIED.get(self.name, "")))

    def _with(self, value: str) -> Option:
        return Option(name=self.name, value=value, words=(self.words[0], value))


def split(argv: Sequence[str]) -> list[Option]:
    """Split a command line into options; skip the program's name. No word is lost."""
    found: list[Option] = []
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            found.append(Option(name="", value=word, words=(word,)))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        value = "" if name in WITHOUT_VALUE or not rest else rest.pop(0)
        plain = name in WITHOUT_VALUE
        found.append(Option(name=name, value=value, words=(word,) if plain else (word, value)))
    return found


def made(name: str, fields: Mapping[str, object], *, as_json: bool = False) -> Option:
    """Build a new option."""
    value = json.dumps(fields, separators=(",", ":")) if as_json else ""
    value = value or _text(fields, _IMPLIED.get(name, ""))
    return Option(name=name, value=value, words=(f"-{name}", value))


def words(line: Iterable[Option]) -> list[str]:
    """Return the words of the options."""
    return [word for option in line for word in option.words]


def _text(fields: Mapping[str, object], implied: str) -> str:
    parts = list[str]()
    for key, value in sorted(fields.items(), key=lambda field: field[0] != implied):
        text = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else str(value)
        escaped = str(text).replace(",", ",,")
        bare = key == implied and not parts and "=" not in escaped and escaped
        parts.append(escaped if bare else f"{key}={escaped}")
    return ",".join(parts)


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list):
            found |= _flat(value, f"{name}.")
        elif isinstance(value, bool):
            found[name] = "on" if value else "off"
        else:
            found[name] = "" if value is None else str(value)
    return found
