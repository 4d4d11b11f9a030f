"""A second reading of the finished command line, independent of the builder.

It knows nothing of what the builder meant: it looks for anything that could name a file, a socket,
a program or an address, at any depth, and reports what the plan does not account for. It shares
nothing with the builder, so that one mistake does not pass both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

_FREE_TEXT = frozenset(
    ["-append", "-name", "-uuid", "-cpu", "-rtc", "-msg", "-prom-env", "-seed", "-smp"]
)
_TEXT_WORDS = """
string serial product manufacturer version vendor family sku asset label mount_tag append data osk
oem_id value
"""
_TEXT_KEYS = frozenset(_TEXT_WORDS.split())
_FILE_WORDS = """
file filename path dir mem-path romfile kernel initrd dtb firmware logfile rootdir tftp smb chroot
splash pcap script downscript helper config log conf url evdev sysfsdev hostdevice db rendernode
"""
_FILE_KEYS = frozenset(_FILE_WORDS.split())
_FILE_OPTION_WORDS = """
-kernel -initrd -dtb -bios -hda -hdb -hdc -hdd -cdrom -fda -fdb -pflash -sd -mtdblock -D -pidfile
-mem-path -option-rom -readconfig -plugin -writeconfig -chroot -shim -L -qtest-log -dump-vmstate
"""
_FILE_OPTIONS = frozenset(_FILE_OPTION_WORDS.split())
_ADDRESS_WORDS = """
host port server connect listen mcast udp localaddr local remote hostfwd guestfwd
"""
_ADDRESS_KEYS = frozenset(_ADDRESS_WORDS.split())
_COMMAND = re.compile(r"(^|[-=:,\s'\"])((unix)?exec|cmd):|\|")
_NO_FILE = frozenset({"no", "none", "on", "off", ""})
_NODE = re.compile(r"[\w.-]+", re.ASCII)
_SCHEME = re.compile(r"^(unix|file|host_device|pipe|vnc|fat|floppy|\d+):")
_SUBNET = re.compile(r"[\d.]+/\d+|[\da-f:]+::/\d+", re.ASCII)
_DEPTH = 8


def unaccounted(
    argv: Sequence[str], targets: Iterable[str], *, cwd: str, own: Iterable[str]
) -> list[tuple[str, str]]:
    """Return (option, text) of what names something on the host that is in none of the ``targets``.

    Args:
        argv: with the program. targets: what the plan says that it touches.
        own: the caller's own words, which are not checked.
    """
    known = tuple(targets)
    trusted = frozenset(own)
    found = []
    option = ""
    for word in argv[1:]:
        is_option = word.startswith("-")
        if word not in trusted:
            for text in _mentions("" if is_option else option, word, cwd):
                if not _is_known(text, known, cwd):
                    found.append((option or word, text))
        option = word if is_option else ""
    return found


def _is_known(text: str, known: tuple[str, ...], cwd: str) -> bool:
    absolute = os.path.normpath(os.path.join(cwd, text))  # noqa: PTH118
    return any(text == one or absolute == one or (len(text) > 2 and text in one) for one in known)


def _mentions(option: str, value: str, cwd: str) -> Iterator[str]:
    if option in _FREE_TEXT:
        return
    if option in _FILE_OPTIONS and "," not in value:
        if _exists(cwd, value) or "/" in value:
            yield value
        return
    for key, text in _leaves("", value, 0):
        last = key.rpartition(".")[2]
        is_node = option == "-blockdev" and last == "file" and _NODE.fullmatch(text)
        if last in _TEXT_KEYS or text in _NO_FILE or _SUBNET.fullmatch(text):
            continue
        if (
            _COMMAND.search(text)
            or "/" in text
            or (last in _ADDRESS_KEYS and option not in ("-device", "-chardev", "-serial"))
            or (last in _FILE_KEYS and not is_node and _exists(cwd, text))
        ):
            yield _SCHEME.sub("", text)


def _exists(cwd: str, text: str) -> bool:
    return bool(text) and "\0" not in text and os.path.lexists(os.path.join(cwd, text))  # noqa: PTH118


def _leaves(key: str, value: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of an option's value, of JSON in it, and of JSON in that."""
    if depth and not value.startswith("json:"):
        yield key, value
        return
    text = value.lstrip()
    if text.startswith(("{", "json:")) and depth < _DEPTH:
        try:
            pairs = list(_json_leaves(json.loads(text.removeprefix("json:")), key))
        except (ValueError, RecursionError):
            pairs = [(key, f"/{value}")]  # not JSON: another parser may read it otherwise
    else:
        parts = [part.partition("=") for part in value.replace(",,", "\0").split(",")]
        pairs = [(name if equals else "", (text if equals else name).replace("\0", ","))
                 for name, equals, text in parts]  # fmt: skip
    for name, leaf in pairs:
        yield from _leaves(name, leaf, depth + 1)


def _json_leaves(tree: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _json_leaves(value, f"{key}.{name}")
    elif isinstance(tree, list):
        for value in tree:
            yield from _json_leaves(value, key)
    elif isinstance(tree, str):
        yield key, tree
