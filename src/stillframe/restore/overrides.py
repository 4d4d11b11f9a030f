"""The caller's own QEMU options, and which recorded ones they take the place of."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.errors import UsageError
from stillframe.restore.draft import Option
from stillframe.restore.option_value import OptionValue

_REPEATED_WORDS = """
global smbios acpitable numa qmp qmp-pretty mon monitor net option-rom usbdevice trace plugin
add-fd debugcon virtfs fw_cfg set prom-env L
"""
_REPEATED = frozenset(_REPEATED_WORDS.split())
_SAME = {
    "M": "machine",
    "enable-kvm": "accel",
    "no-kvm": "accel",
    "disable-kvm": "accel",
    "curses": "display",
}
_BY_ID = frozenset(
    {"netdev", "chardev", "device", "drive", "blockdev", "object", "fsdev", "audiodev", "nic"}
)
_IMPLIED = {"device": "driver", "object": "qom-type", "blockdev": "driver"}
_FORBIDDEN = {
    "daemonize": "Stillframe starts it in the background itself",
    "incoming": "the snapshot comes in",
    "loadvm": "the snapshot is loaded",
    "preconfig": "nobody would end the waiting",
}


class Overrides:
    """Matches the caller's options with recorded ones.

    Raises:
        UsageError: an option that a restore cannot work with.
    """

    def __init__(self, extra: Sequence[Option]) -> None:
        for option in extra:
            if option.name in _FORBIDDEN:
                raise UsageError(
                    f"-{option.name} does not go with a restore", why=_FORBIDDEN[option.name]
                )
        self._waiting = list(extra)
        self._taken: set[str] = set()
        self.names = frozenset(_canonical(option.name) for option in extra)

    def take(self, recorded: Option) -> tuple[str, ...] | None:
        """The words that take the place of a recorded option; None if it stands.

        All of the caller's options of a single kind come in the place of the first recorded one.
        """
        key = _key(recorded)
        if key is None:
            return None
        if key in self._taken:
            return ()
        matching = [option for option in self._waiting if _key(option) == key]
        if not matching:
            return None
        self._taken.add(key)
        self._waiting = [option for option in self._waiting if option not in matching]
        return tuple(word for option in matching for word in option.words)

    def rest(self) -> list[tuple[str, ...]]:
        """Those that took no recorded option's place."""
        return [option.words for option in self._waiting]


def _canonical(name: str) -> str:
    return _SAME.get(name, name)


def _key(option: Option) -> str | None:
    """What makes an option the same as another; None if QEMU takes many of it."""
    name = _canonical(option.name)
    if name in _BY_ID:
        value = OptionValue(option.value, _IMPLIED.get(name, ""))
        identity = value.get("node-name" if name == "blockdev" else "id")
        return f"{name}:{identity}" if identity else None
    return None if name in _REPEATED else name
