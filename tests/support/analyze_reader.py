"""An independent reader of migration streams, which goes by the vmdescription alone.

It reads as QEMU's ``scripts/analyze-migration.py`` is described to read (nothing of Stillframe
is used here): the JSON comes from the file's tail, then each section is read by exactly the
described sizes, subsections strictly in the JSON's order, to the last byte.
"""

from __future__ import annotations

import json
import re
from typing import Any

_NUMBER = re.compile(r"(u?)int(8|16|32|64)")


class AnalyzeError(Exception):
    """The stream is not as its description says."""


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise AnalyzeError(what)


class _File:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def take(self, size: int) -> bytes:
        _check(size >= 0 and self.place + size <= len(self.data), f"short at {self.place}")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self, length_size: int = 1) -> str:
        return self.take(self.number(length_size)).decode()


def description(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON at the end, and where its type byte is."""
    window = max(0, len(data) - (10 << 20))
    nul = data.rindex(b"\0", window)
    brace = data.index(b"{", nul)
    _check(data[brace - 5] == 6, "no description section before the JSON")
    length = int.from_bytes(data[brace - 4 : brace], "big")
    _check(brace + length == len(data), "something follows the JSON")
    return json.loads(data[brace:]), brace - 5


class Analysis:
    """What the file holds, as the script would print it.

    ``state``: device states by "idstr (section id)". ``ram``: block lengths.
    ``pages``: number of page records, ``zero``: of zero records.
    """

    def __init__(self, data: bytes, page_bytes: int = 4096) -> None:
        self.state: dict[str, Any] = {}
        self.ram: dict[str, int] = {}
        self.pages = 0
        self.zero = 0
        self.configuration: str | None = None
        self._desc, self._end = description(data)
        self._devices = {(d["name"], d["instance_id"]): d for d in self._desc["devices"]}
        self._file = _File(data)
        self._page_bytes = self._desc.get("page_size", page_bytes)
        self._read()

    def _read(self) -> None:
        file = self._file
        _check(file.take(8) == b"QEVM\0\0\0\3", "header")
        ram_ids: set[int] = set()
        while True:
            kind = file.number(1)
            if kind == 0:
                break
            if kind == 7:
                self.configuration = self._configuration()
                continue
            _check(kind in (1, 2, 3, 4), f"unknown section type {kind} at {file.place}")
            section_id = file.number(4)
            if kind in (1, 4):
                idstr, instance, _version = file.text(), file.number(4), file.number(4)
                if idstr == "ram":
                    ram_ids.add(section_id)
                else:
                    key = f"{idstr} ({section_id})"
                    _check(key not in self.state, f"{key} twice")
                    self.state[key] = self._fields(self._devices[(idstr, instance)])
            if section_id in ram_ids:
                self._ram()
            else:
                _check(kind == 4, f"part of unknown section {section_id}")
            if file.data[file.place] == 0x7E:
                file.take(1)
                _check(file.number(4) == section_id, "footer's id")
        _check(file.place == self._end, f"sections end at {file.place}, not {self._end}")

    def _configuration(self) -> str:
        """The machine type; read by its description, which QEMU 8.2 and later write."""
        described = self._desc.get("configuration")
        if described is None:
            return self._file.text(4)
        values = self._fields(described)
        name = bytes.fromhex(values["name"]).decode()
        _check(len(name) == values["len"], "length of the machine type")
        return name

    def _ram(self) -> None:
        file = self._file
        while True:
            word = file.number(8)
            flags = word & (self._page_bytes - 1)
            offset = word - flags
            if flags == 0x10:
                return
            if flags == 4:
                while offset > 0:
                    name, length = file.text(), file.number(8)
                    self.ram[name] = length
                    offset -= length
                _check(offset == 0, "sum of block lengths")
                continue
            kind = flags & ~0x20
            _check(kind in (2, 8), f"RAM record with flags {flags:#x} at {file.place}")
            if not flags & 0x20:
                self._block = file.text()
            _check(offset < self.ram[self._block], "page beyond its block")
            if kind == 8:
                file.take(self._page_bytes)
                self.pages += 1
            else:
                _check(file.number(1) == 0, "zero page's byte")
                self.zero += 1

    def _fields(self, desc: dict[str, Any]) -> dict[str, Any]:
        """A structure's values by name; lists where there is more than one of a name."""
        file = self._file
        values: dict[str, Any] = {}
        for field in desc["fields"]:
            name, count = field["name"], field.get("array_len", 1)
            if "index" in field:
                before = values.get(name, [])
                _check(len(before) == field["index"], f"index of {name}")
                values[name] = before
            elif count > 1:
                values[name] = []
            for _ in range(count):
                start = file.place
                value = self._value(field)
                _check(file.place - start == field["size"], f"size of {name}")
                if isinstance(values.get(name), list):
                    values[name].append(value)
                else:
                    _check(name not in values, f"{name} twice")
                    values[name] = value
        for subsection in desc.get("subsections", ()):
            _check(file.number(1) == 5, f"subsection {subsection['vmsd_name']} missing")
            _check(file.text() == subsection["vmsd_name"], "subsection's name")
            _check(file.number(4) == subsection["version"], "subsection's version")
            values[subsection["vmsd_name"]] = self._fields(subsection)
        return values

    def _value(self, field: dict[str, Any]) -> Any:
        """A number, a bool, a structure, or any other bytes in hexadecimal."""
        kind, size = field["type"], field["size"]
        if kind == "struct":
            return self._fields(field["struct"])
        raw = self._file.take(size)
        number = _NUMBER.fullmatch(kind)
        if number is not None:
            _check(8 * size == int(number[2]), f"{kind} of {size} bytes")
            return int.from_bytes(raw, "big", signed=not number[1])
        if kind == "bool":
            _check(size == 1, f"bool of {size} bytes")
            return raw != b"\0"
        return raw.hex()
