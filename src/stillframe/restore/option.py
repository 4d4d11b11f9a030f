"""The options of a command line, one by one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stillframe.errors import StillframeError
from stillframe.machine.qemu.command_line import options
from stillframe.restore.option_value import OptionValue
from stillframe.restore.show import shown_words

IMPLIED = {
    "device": "driver",
    "global": "driver",
    "object": "qom-type",
    "blockdev": "driver",
    "drive": "file",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "chardev": "backend",
    "audiodev": "driver",
    "audio": "driver",
    "display": "type",
    "vnc": "vnc",
    "machine": "type",
    "M": "type",
    "accel": "accel",
    "numa": "type",
    "fsdev": "fsdriver",
    "virtfs": "fsdriver",
    "plugin": "file",
    "icount": "shift",
    "mon": "chardev",
    "m": "size",
    "name": "guest",
    "fw_cfg": "name",
}
"""The key of a first part without ``=``."""
JSON_OPTIONS = frozenset({"device", "object", "blockdev", "netdev", "audiodev", "display"})
"""Options whose values may be JSON; elsewhere QEMU takes a brace as a key like any other."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option. ``name``: without dashes, empty for a bare disk image. ``words``: as given."""

    name: str
    value: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shown_words(self.words)

    def parsed(self) -> OptionValue:
        """Return its value, by keys.

        Raises:
            DataError: malformed JSON.
        """
        return OptionValue(self.value, IMPLIED.get(self.name, ""), json=self.name in JSON_OPTIONS)

    def with_value(self, value: str) -> tuple[str, str]:
        """Return the option's words with another value."""
        return self.words[0], value


def takes_value(name: str) -> bool:
    """Whether a value follows QEMU's option, according to the one parser of command lines."""
    return next(options(["", f"-{name}", "value"]))[1] == "value"


def split_options(words: Sequence[str], error: type[StillframeError]) -> list[Option]:
    """Return the options of a command line (without the program's name).

    An option without its value would take the next word that we write, and shift all others.

    Raises:
        error: a word that is not an option, or an option without its value.
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
