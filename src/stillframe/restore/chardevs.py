"""Serial lines, character devices and monitors: moved to private sockets and files.

Sources: QEMU ``qemu-options.hx`` (-chardev, -serial, -mon), ``chardev/char.c``.
"""

from __future__ import annotations

import re

from stillframe.restore.builder import Builder
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue, escape_commas

_HARMLESS = {
    **dict.fromkeys(("null", "none", "pty", "memory", "msmouse", "wctablet", "testdev"), ""),
    "vc": "width height cols rows",
    "ringbuf": "size",
    "memory": "size",
    "spicevmc": "name",
    "spiceport": "name",
    "qemu-vdagent": "name mouse clipboard",
    "dbus": "name",
}
"""Backends within QEMU, with the keys that they keep."""
_HUB_KEYS = ("chardevs.0", "chardevs.1", "chardevs.2", "chardevs.3")
_HARMLESS_LINE = re.compile(
    r"none|null|pty|msmouse|wctablet|testdev|vc(:\d+C?x\d+C?)?|chardev:[\w.:-]+", re.ASCII
)
_MOVED = "the first VM may use it still; private now"
_OWN_MONITOR = "replaced by a monitor of its own"


def serial(builder: Builder, option: Option) -> None:
    """``-serial``, ``-parallel``, ``-debugcon``, in the short form of chardevs."""
    value = option.value.removeprefix("mon:")
    kind = re.split(r"[:,]", value, maxsplit=1)[0]
    if kind == "pty" or _HARMLESS_LINE.fullmatch(value):
        line = "pty" if kind == "pty" else value  # without a path for a link to it
        builder.replace(option, option.with_value(line), _OWN_MONITOR)
    elif kind == "file":
        path = builder.private_file(option.name, option)
        builder.replace(option, option.with_value(f"file:{escape_commas(path)}"), _MOVED)
    else:
        builder.replace(option, option.with_value(_line(builder, option, option.name)), _MOVED)


def default_serial(builder: Builder, option: Option) -> None:
    """``-nographic`` puts the first serial line on the terminal unless one is given."""
    builder.keep(option)
    names = {other.name for other in (*builder.recorded, *builder.own)}
    if not names & {"serial", "nodefaults"}:
        words = ("-serial", _line(builder, option, "serial"))
        builder.add(words, "-nographic would put it on the terminal")


def _line(builder: Builder, option: Option, name: str) -> str:
    path = builder.private_socket(name, option)
    log = builder.private_file(name, option)
    return f"unix:{escape_commas(path)},server=on,wait=off,logfile={escape_commas(log)}"


def chardev(builder: Builder, option: Option) -> None:
    """``-chardev``: what reaches outside becomes a private socket or file of the same id."""
    value = option.parsed()
    identity = value.get("id")
    if _serves_monitors_only(builder, identity):
        builder.drop(option, _OWN_MONITOR)
        return
    backend = value.get("backend")
    new: dict[str, str] = {}
    if backend in _HARMLESS or backend == "hub":
        keys = _HUB_KEYS if backend == "hub" else tuple(_HARMLESS[backend].split())
        new |= {key: value.get(key) for key in keys if value.get(key)}
        kept = backend
    elif backend == "file":
        kept, new["path"] = "file", builder.private_file(identity, option)
    else:
        kept, path = "socket", builder.private_socket(identity, option)
        new |= {"path": path, "server": "on", "wait": "off"}
    if value.get("logfile"):
        new["logfile"] = builder.private_file(f"{identity}-log", option)
    elif backend == "stdio":
        new["logfile"] = builder.private_file(identity, option)
    text = OptionValue(kept, "backend")
    for key in ("id", "mux", "logappend"):
        if value.get(key):
            text.set(key, value.get(key))
    for key, setting in new.items():
        text.set(key, setting)
    if set(text.items()) == set(value.items()):
        builder.keep(option)
    else:
        builder.replace(option, option.with_value(text.text), _MOVED)


def monitor(builder: Builder, option: Option) -> None:
    """``-qmp``, ``-monitor``, ``-mon``."""
    builder.drop(option, _OWN_MONITOR)


def _serves_monitors_only(builder: Builder, identity: str) -> bool:
    by_monitor = False
    reference = re.compile(rf"""chardev\d?["']?\s*[=:]\s*["']?{re.escape(identity)}(?![\w.-])""")
    for option in builder.recorded:
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
