"""Serial lines, character devices and monitors: moved to private sockets and files.

Sources: QEMU ``qemu-options.hx`` (-chardev, -serial, -mon), ``chardev/char.c``.
"""

from __future__ import annotations

import re

from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue, escape_commas

_HARMLESS_WORDS = """
null none vc pty ringbuf memory mux hub msmouse wctablet testdev spicevmc spiceport qemu-vdagent
dbus
"""
_HARMLESS = frozenset(_HARMLESS_WORDS.split())
_MOVED = "the first VM may use it still; private now"
_OWN_MONITOR = "replaced by a monitor of its own"


def serial(draft: Draft, option: Option) -> None:
    """``-serial``, ``-parallel``, ``-debugcon``, in the short form of chardevs."""
    value = option.value.removeprefix("mon:")
    kind = re.split(r"[:,]", value, maxsplit=1)[0]
    if kind in _HARMLESS or kind in ("chardev", "con"):
        if kind == "pty":
            value = kind  # without a link to it somewhere
        draft.replace(option, (option.words[0], value), _OWN_MONITOR)
        return
    if kind == "file":
        path = draft.private_file(option.name, option)
        draft.replace(option, (option.words[0], f"file:{escape_commas(path)}"), _MOVED)
        return
    draft.replace(option, (option.words[0], _line(draft, option, option.name)), _MOVED)


def default_serial(draft: Draft, option: Option) -> None:
    """``-nographic`` puts the first serial line on the terminal unless one is given."""
    draft.keep(option)
    names = {other.name for other in draft.recorded}
    if not names & {"serial", "nodefaults"}:
        words = ("-serial", _line(draft, option, "serial"))
        draft.add(words, "-nographic would put it on the terminal")


def _line(draft: Draft, option: Option, name: str) -> str:
    path = draft.private_socket(name, option)
    log = draft.private_file(name, option)
    return f"unix:{escape_commas(path)},server=on,wait=off,logfile={escape_commas(log)}"


def chardev(draft: Draft, option: Option) -> None:
    """``-chardev``: what reaches outside becomes a private socket or file of the same id."""
    value = OptionValue(option.value, "backend")
    identity = value.get("id")
    if _serves_monitors_only(draft, identity):
        draft.drop(option, _OWN_MONITOR)
        return
    log = {}
    if value.get("logfile"):
        log = {"logfile": draft.private_file(f"{identity}-log", option)}
    backend = value.get("backend")
    if backend in _HARMLESS:
        if backend == "pty":
            value.drop("path")
        for key, path in log.items():
            value.set(key, path)
        draft.scan(option, value, known=("id", "name", "logfile"))
        draft.replace(option, (option.words[0], value.text), _MOVED)
        return
    if backend == "file":
        given = {"path": draft.private_file(identity, option)}
    else:
        backend = "socket"
        path = draft.private_socket(identity, option)
        given = {"path": path, "server": "on", "wait": "off"}
    if backend == "socket" and value.get("backend") == "stdio" and not log:
        log = {"logfile": draft.private_file(identity, option)}
    new = OptionValue(backend, "backend")
    for key in ("id", "mux", "logappend"):
        if value.get(key):
            new.set(key, value.get(key))
    for key, text in (given | log).items():
        new.set(key, text)
    draft.replace(option, (option.words[0], new.text), _MOVED)


def monitor(draft: Draft, option: Option) -> None:
    """``-qmp``, ``-monitor``, ``-mon``."""
    draft.drop(option, _OWN_MONITOR)


def _serves_monitors_only(draft: Draft, identity: str) -> bool:
    by_monitor = False
    reference = re.compile(rf"""chardev["']?\s*[=:]\s*["']?{re.escape(identity)}(?![\w.-])""")
    for option in draft.recorded:
        if option.name in ("mon", "qmp", "qmp-pretty", "monitor"):
            named = OptionValue(option.value, "chardev").get("chardev")
            by_monitor |= identity in (named, option.value.removeprefix("chardev:"))
        elif option.name != "chardev" and _mentions(option, identity, reference):
            return False
    return by_monitor


def _mentions(option: Option, identity: str, reference: re.Pattern[str]) -> bool:
    if reference.search(option.value):
        return True
    # Filters call it indev, outdev and so on.
    return option.name == "object" and identity in option.value
