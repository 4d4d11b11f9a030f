"""The new command line while it is being written, and all that is learnt on the way."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from stillframe.errors import StillframeError
from stillframe.machine.qemu.command_line import options
from stillframe.model import DiskRecord, MachineRecord
from stillframe.restore.option_value import OptionValue
from stillframe.restore.places import Places, private_name
from stillframe.restore.records import (
    Access,
    DiskOverlay,
    Refusal,
    Rewrite,
    Risk,
    Touch,
    TouchKind,
)
from stillframe.restore.show import shown_words

_FD_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sockfd", "fdset", "fdname"})
_FILE_KEYS = frozenset({"dir", "dtb", "kernel", "initrd", "firmware", "shim", "rootdir"})
_RUNS_PROGRAM = re.compile(r"(?:^|[-=:])(?:exec|cmd):")
_FD_REMEDY = "give that option yourself after --, with the same id"


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded option. ``name``: without dashes, empty for a bare disk image.
    ``words``: as recorded."""

    name: str
    value: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shown_words(self.words)


def takes_value(name: str) -> bool:
    """Whether QEMU's option is followed by a value, as the one parser of command lines has it."""
    return next(options(["", f"-{name}", "value"]))[1] == "value"


def split_options(words: Sequence[str], error: type[StillframeError]) -> list[Option]:
    """The options of a command line (without the program's name).

    An option without its value would take the next word that we write, and shift all others.

    Raises:
        error: a word that is no option, or an option without its value.
    """
    found: list[Option] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-", "--"):
            raise error(f"{word} is no option of QEMU")
        if not word.startswith("-"):
            found.append(Option(name="", value=word, words=(word,)))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if takes_value(name):
            if not rest:
                raise error(f"{shown_words([word])} has no value")
            value = rest.pop(0)
            found.append(Option(name=name, value=value, words=(word, value)))
        else:
            found.append(Option(name=name, value="", words=(word,)))
    return found


class Draft:
    """Takes decisions about options, one after the other."""

    def __init__(self, record: MachineRecord, places: Places, recorded: Sequence[Option]) -> None:
        self.record = record
        self.places = places
        self.recorded = tuple(recorded)
        self.words: list[str] = []
        self.rewrites: list[Rewrite] = []
        self.touches: list[Touch] = []
        self.overlays: list[DiskOverlay] = []
        self.refusals: list[Refusal] = []
        self.risks: list[Risk] = []
        self.notes: list[str] = []
        self._names: set[str] = set()
        self._refused: list[Option] = []

    # Decisions. One that was refused stays refused.

    def keep(self, option: Option) -> None:
        """As recorded."""
        if option not in self._refused:
            self.words += option.words

    def drop(self, option: Option, reason: str) -> None:
        """Leave it out."""
        self.rewrites.append(Rewrite(before=option.text, after="", reason=reason))

    def replace(self, option: Option, words: Iterable[str], reason: str) -> None:
        """Write ``words`` in its place; nothing is noted if they are the same."""
        if option in self._refused:
            return
        new = tuple(words)
        self.words += new
        if new != option.words:
            self.rewrites.append(Rewrite(before=option.text, after=shown_words(new), reason=reason))

    def add(self, words: Sequence[str], reason: str) -> None:
        """Write an option that was not there."""
        self.words += words
        self.rewrites.append(Rewrite(before="", after=shown_words(words), reason=reason))

    def refuse(self, option: Option, reason: str, remedy: str) -> None:
        """It cannot be used, and cannot be left out either."""
        self._refused.append(option)
        self.refusals.append(Refusal(option=option.text, reason=reason, remedy=remedy))

    def risk(self, option: Option, reason: str) -> None:
        """It is for a caller to allow who has read it."""
        self.risks.append(Risk(option=option.text, reason=reason))

    # What is learnt

    def touch(
        self,
        kind: TouchKind,
        access: Access,
        target: str,
        option: Option | None,
        *,
        required: bool = False,
    ) -> None:
        """Note that something of the host is used."""
        entry = Touch(
            kind=kind,
            access=access,
            target=target,
            option=option.text if option else "",
            required=required,
        )
        if entry not in self.touches:
            self.touches.append(entry)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def disk_record(self, identity: str) -> DiskRecord | None:
        """What the monitor said of a disk at the instant, by its drive id or node name."""
        for disk in self.record.disks:
            if identity and identity in (disk.device, disk.node_name):
                return disk
        return None

    # Paths

    def resolve(self, path: str) -> str:
        """A recorded path, absolute."""
        return os.path.normpath(Path(self.record.cwd or "/", path))

    def read_file(self, path: str, option: Option, *, required: bool = True) -> None:
        """Note a file that QEMU reads.

        Args:
            required: QEMU does not start without it.
        """
        resolved = self.resolve(path)
        kind: TouchKind = "device" if resolved.startswith("/dev/") else "file"
        self.touch(kind, "read", resolved, option, required=required)

    def private_path(self, name: str, suffix: str) -> Path:
        """A new name in the restore's own directory."""
        name = private_name(name)
        candidate, number = f"{name}{suffix}", 1
        while candidate in self._names:
            candidate, number = f"{name}-{number}{suffix}", number + 1
        self._names.add(candidate)
        return self.places.run / candidate

    def private_socket(self, name: str, option: Option) -> str:
        """A path for a unix socket of our own."""
        path = str(self.private_path(name, ".sock"))
        self.touch("socket", "listen", path, option)
        return path

    def private_file(self, name: str, option: Option) -> str:
        """A path for a file of our own."""
        path = str(self.private_path(name, ".log"))
        self.touch("file", "create", path, option)
        return path

    # What any option may hold

    def scan(self, option: Option, value: OptionValue, *, known: Iterable[str] = ()) -> None:
        """Note or refuse what a kept value names of the host.

        Args:
            known: keys that have been dealt with, or that hold text only.
        """
        passed = frozenset(known)
        for key, text in value.items():
            last = key.rpartition(".")[2]
            if key in passed:
                continue
            if last in _FD_KEYS or "/dev/fdset/" in text:
                self.refuse(
                    option, "it uses a file descriptor that the first VM was given", _FD_REMEDY
                )
                return
            if _RUNS_PROGRAM.search(text):
                self.touch("program", "run", text, option)
                self.risk(option, f"it runs a program: {text}")
            elif "/" in text or (_is_file_key(last) and os.path.lexists(self.resolve(text))):
                self.read_file(text, option, required=False)


def _is_file_key(key: str) -> bool:
    return key.endswith(("file", "path", "filename")) or key in _FILE_KEYS
