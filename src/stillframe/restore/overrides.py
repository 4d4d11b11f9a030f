"""The caller's own QEMU options, and the recorded ones that they replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

from stillframe.errors import UsageError
from stillframe.restore.drives import SHORT_FORMS, as_drive
from stillframe.restore.networks import NIC_KEYS
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue, escape_commas

_ADDED_WORDS = "global qmp qmp-pretty mon monitor usbdevice trace plugin add-fd debugcon prom-env L"
_ADDED = frozenset(_ADDED_WORDS.split())
_SAME = {
    "M": "machine",
    "enable-kvm": "accel",
    "no-kvm": "accel",
    "disable-kvm": "accel",
    "curses": "display",
    **dict.fromkeys(SHORT_FORMS, "drive"),
}
_ID_KEYS = {
    **dict.fromkeys(("netdev", "chardev", "object", "fsdev", "audiodev"), "id"),
    **dict.fromkeys(("device", "drive", "nic", "net"), "id"),
    "blockdev": "node-name",
    "virtfs": "mount_tag",
    "fw_cfg": "name",
}
"""The key that names one of several."""
_COUNTED = frozenset({"device", "drive", "nic", "net", "acpitable", "option-rom", "smbios"})
"""The caller's first of a kind replaces the first recorded one, the second the second."""
_FORBIDDEN = {
    "daemonize": "Stillframe starts it in the background itself",
    "incoming": "the snapshot comes in",
    "loadvm": "the snapshot is loaded",
    "preconfig": "nobody would end the waiting",
}


class Overrides:
    """The caller's options, matched with recorded ones.

    ``standing``: the recorded options that nothing replaces; ``replaced``: the others.

    Raises:
        UsageError: an option that a restore cannot work with.
    """

    def __init__(self, recorded: Sequence[Option], own: Sequence[Option]) -> None:
        for option in own:
            if option.name in _FORBIDDEN:
                raise UsageError(
                    f"-{option.name} does not go with a restore", why=_FORBIDDEN[option.name]
                )
        self.own = tuple(own)
        self.names = frozenset(map(_canonical, own))
        self._words: dict[int, tuple[str, ...]] = {}
        waiting = list(own)
        for keys_of in (_by_id, _by_place, _by_count, _by_name):
            keys = list(keys_of(waiting, own=True))
            waiting = self._match(recorded, list(keys_of(recorded, own=False)), waiting, keys)
        self.rest = waiting
        """The caller's options that replaced no recorded one."""
        self.standing = [o for n, o in enumerate(recorded) if n not in self._words]
        self.replaced = [o for n, o in enumerate(recorded) if n in self._words]

    def words_at(self, number: int) -> tuple[str, ...] | None:
        """Return the words that replace a recorded option; None if it stands."""
        return self._words.get(number)

    def _match(
        self,
        recorded: Sequence[Option],
        recorded_keys: list[Key],
        own: list[Option],
        own_keys: list[Key],
    ) -> list[Option]:
        places: dict[Key, list[int]] = {}
        for number, key in enumerate(recorded_keys):
            if key is not None and number not in self._words:
                places.setdefault(key, []).append(number)
        left = []
        for option, key in zip(own, own_keys, strict=True):
            if key is None or key not in places:
                left.append(option)
                continue
            first, *others = places[key]
            self._words[first] = self._words.get(first, ()) + _carried(recorded[first], option)
            self._words |= dict.fromkeys(others, ())
        return left


Key = tuple[str, ...] | None
"""What makes two options the same; None if nothing does."""


def _canonical(option: Option) -> str:
    return _SAME.get(option.name, option.name)


def _value(option: Option) -> OptionValue:
    return as_drive(option) if _canonical(option) == "drive" else option.parsed()


def _by_id(options: Sequence[Option], *, own: bool) -> Iterator[Key]:
    for option in options:
        name = _canonical(option)
        identity = _value(option).get(_ID_KEYS[name]) if name in _ID_KEYS else ""
        yield (name, identity) if identity else None


def _by_place(options: Sequence[Option], *, own: bool) -> Iterator[Key]:
    """Yield interface and index of drives, counted as QEMU does (``blockdev.c``, drive_new); of the
    caller's, only those with an index."""
    taken: set[Key] = set()
    for option in options:
        value = _value(option) if _canonical(option) == "drive" else OptionValue("if=none", "")
        interface, index = value.get("if", "ide"), value.get("index")
        if interface == "none" or value.get("bus") or value.get("unit") or (own and not index):
            yield None
            continue
        free = (key for n in count() if (key := (interface, str(n))) not in taken)
        key = (interface, index) if index else next(free)
        taken.add(key)
        yield key


def _by_count(options: Sequence[Option], *, own: bool) -> Iterator[Key]:
    """Match the first of a kind with the first recorded one, unless it has an unrecorded id."""
    seen: Counter[Key] = Counter()
    for option in options:
        name = _canonical(option)
        value = _value(option) if name in _ID_KEYS else option.parsed()
        kind: tuple[str, ...] = (name,)
        if name == "drive":
            kind = (name, value.get("if", "ide"), value.get("media", "disk"))
        elif name == "device":
            kind = (name, value.get("driver"))
        elif name == "net":
            kind = (name, "card" if value.get("type") == "nic" else "network")
        elif name == "smbios":
            kind = (name, value.get("type"))
        has_place = name in ("drive", "nic") and "none" not in kind
        if name not in _COUNTED or (own and value.get("id") and not has_place):
            yield None
            continue
        yield (*kind, str(seen[kind]))
        seen[kind] += 1


def _by_name(options: Sequence[Option], *, own: bool) -> Iterator[Key]:
    """Match options that QEMU knows only one of, or of which the caller's replace all recorded."""
    several = _ADDED | _COUNTED | _ID_KEYS.keys()
    for option in options:
        name = _canonical(option)
        yield None if name in several else (name,)


def _carried(recorded: Option, own: Option) -> tuple[str, ...]:
    """Return the caller's option, with the keys by which others know the recorded one."""
    name = _canonical(own)
    if name not in ("drive", "device", "nic") or own.value.startswith("{"):
        return own.words
    old, new = _value(recorded), _value(own)
    keys = ("id", *NIC_KEYS) if name == "nic" and new.get("type") != "none" else ("id",)
    missing = [key for key in keys if old.get(key) and not new.get(key)]
    if not missing:
        return own.words
    more = "".join(f",{key}={escape_commas(old.get(key))}" for key in missing)
    return ("-drive", new.text + more) if name == "drive" else own.with_value(own.value + more)
