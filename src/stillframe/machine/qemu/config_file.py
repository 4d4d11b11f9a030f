"""The expansion of ``-readconfig FILE`` and ``-set`` into the options that they stand for.

Syntax: QEMU ``util/qemu-config.c`` (qemu_config_foreach), ``softmmu/vl.c`` (qemu_set_option).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillframe.machine.qemu.options import Option, made
from stillframe.model import FileRecord

_MAX_BYTES = 1 << 20
_GROUP = re.compile(r'\[\s*([\w-]+)\s*(?:"([^"]*)")?\s*\]')
_ARGUMENT = re.compile(r'\s*([^\s="]+)\s*=\s*"([^"]*)"\s*')
_SET = re.compile(r"([^.=]+)\.([^.=]+)\.([^=]+)=(.*)", re.DOTALL)
_GROUP_OPTIONS = {"memory": "m", "smp-opts": "smp", "boot-opts": "boot", "realtime": "overcommit"}
"""Option groups whose name differs from the option's (QEMU ``QemuOptsList.name``)."""


class Expansion:
    """The expansion of a command line; ``files``: those that were read, ``notes``: what could not
    be read."""

    def __init__(self, directory: Path) -> None:
        """``directory``: the base of relative paths."""
        self._directory = directory
        self.files: list[FileRecord] = []
        self.notes: list[str] = []

    def expand(self, line: Sequence[Option]) -> list[Option]:
        """Return the line without ``-readconfig`` and ``-set``; those that cannot be applied
        stay."""
        found: list[Option] = []
        for option in line:
            if option.name == "readconfig":
                found += self._config(option)
            elif option.name != "set" or not _set(found, option.value):
                found.append(option)
        return found

    def _config(self, option: Option) -> list[Option]:
        path = self._directory / option.value
        try:
            with path.open("rb") as file:  # a FIFO or a device has no end: bound the read
                text = file.read(_MAX_BYTES).decode()
            groups = list(_groups(text))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            self.notes.append(f"-readconfig {option.value} cannot be read any more: {why}")
            return [option]
        self.files.append(FileRecord(path=str(path), text=text))
        return groups


def _groups(text: str) -> Iterator[Option]:
    name, fields = "", dict[str, str]()
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        group, argument = _GROUP.match(line), _ARGUMENT.fullmatch(line)
        if group:
            if name:
                yield made(name, fields)
            name = _GROUP_OPTIONS.get(group[1], group[1])
            fields = {"id": group[2]} if group[2] else {}
        elif argument and name:
            fields[argument[1]] = argument[2]
        else:
            raise ValueError(f"no line of a configuration: {line.strip()[:60]}")
    if name:
        yield made(name, fields)


def _set(line: list[Option], text: str) -> bool:
    """Apply ``GROUP.ID.KEY=VALUE`` to the option that it refers to; return False if there is
    none."""
    match = _SET.fullmatch(text)
    if match is None:
        return False
    group, identity, key, value = match.groups()
    for index, option in enumerate(line):
        if option.name == group and not option.is_json and option.fields().get("id") == identity:
            line[index] = option.changed({key: value})
            return True
    return False
