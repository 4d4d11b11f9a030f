"""The facts in a QEMU command line: name, RAM, accelerator, monitors (QEMU ``qemu-options.hx``).

Only what is needed to list and find VMs; nothing here runs or rewrites a command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

_FLAGS = """
h help version s S enable-kvm disable-kvm no-kvm nodefaults no-user-config nouserconfig
nodefconfig nographic no-reboot no-shutdown no-acpi no-hpet no-fd-bootchk snapshot full-screen
no-quit no-frame alt-grab ctrl-grab daemonize singlestep one-insn-per-tb portrait sdl curses
win2k-hack show-cursor old-param semihosting mem-prealloc preconfig only-migratable
enable-sync-profile xen-attach xen-domid-restrict usb no-audio async-teardown perfmap jitdump
virtfs_synth audio-help
no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection
"""
WITHOUT_VALUE = frozenset(_FLAGS.split())
_ON = frozenset({"", "on", "yes", "y", "true"})
_DEFAULT_RAM_BYTES = 128 << 20
_SUFFIX_BYTES = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_ANY_HOST = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Chardev(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a monitor's socket: a unix path (as given), (host, port), or an inherited
    fd."""

    path: str | None = None
    host_port: tuple[str, int] | None = None
    fd: int | None = None


class CommandLine(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one command line. ``accelerators``: in the order in which QEMU tries them.
    ``monitors``: those that speak QMP; ``human_monitors``: those for people."""

    name: str
    ram_bytes: int
    machine: str
    accelerators: tuple[str, ...]
    monitors: tuple[Chardev, ...]
    human_monitors: tuple[Chardev, ...]


def options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (option, value) pairs without the leading dashes; skip the program's name."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            continue  # a disk image
        option = word[2:] if word.startswith("--") else word[1:]
        yield option, "" if option in WITHOUT_VALUE else next(words, "")


def key_values(text: str, implied: str) -> dict[str, str]:
    """Return ``a=b,c`` as a dict; a bare ``c`` means on; a doubled comma stands for one in a value
    (QEMU ``util/keyval.c``)."""
    found: dict[str, str] = {}
    # An argument cannot hold a NUL byte, so one can stand for the doubled comma.
    parts = text.replace(",,", "\0").split(",") if text else []
    for index, part in enumerate(parts):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals:
            key, value = (implied, key) if index == 0 else (key, "on")
        found[key] = value
    return found


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Read the facts; skip unknown or malformed parts."""
    name, machine, ram_bytes = "", "", _DEFAULT_RAM_BYTES
    accelerators: list[str] = []
    chardevs: dict[str, Chardev] = {}
    control: list[str] = []
    readline: list[str] = []
    monitors: list[Chardev] = []
    human: list[Chardev] = []
    for option, value in options(argv):
        if option == "name":
            name = key_values(value, "guest").get("guest", name)
        elif option == "m":
            ram_bytes = _size_bytes(key_values(value, "size").get("size", "")) or ram_bytes
        elif option in ("machine", "M"):
            machine_options = key_values(value, "type")
            machine = machine_options.get("type", machine)
            if "accel" in machine_options:
                accelerators += machine_options["accel"].split(":")
        elif option == "accel":
            accelerators += key_values(value, "accel").get("accel", "").split(":")
        elif option == "enable-kvm":
            accelerators.append("kvm")
        elif option == "chardev":
            chardev_options = key_values(value, "backend")
            chardev = _chardev(chardev_options)
            if chardev is not None:
                chardevs[chardev_options.get("id", "")] = chardev
        elif option == "mon":
            mon = key_values(value, "chardev")
            named = control if mon.get("mode") == "control" else readline
            named.append(mon.get("chardev", ""))
        elif option in ("qmp", "qmp-pretty", "monitor"):
            named, listed = (readline, human) if option == "monitor" else (control, monitors)
            if value.startswith("chardev:"):
                named.append(value.removeprefix("chardev:"))
            elif (listener := _legacy_chardev(value)) is not None:
                listed.append(listener)
    if not accelerators and argv and argv[0].rpartition("/")[2] in ("kvm", "qemu-kvm"):
        accelerators.append("kvm")
    monitors += [chardevs[identity] for identity in control if identity in chardevs]
    human += [chardevs[identity] for identity in readline if identity in chardevs]
    return CommandLine(
        name=name,
        ram_bytes=ram_bytes,
        machine=machine,
        accelerators=tuple(a for a in accelerators if a) or ("tcg",),
        monitors=tuple(monitors),
        human_monitors=tuple(human),
    )


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    return int(float(match[1]) * _SUFFIX_BYTES[match[2]]) if match else 0


def _chardev(given: dict[str, str]) -> Chardev | None:
    """Return a socket chardev on which QEMU listens, else None."""
    if given.get("backend") != "socket" or given.get("server", "off") not in _ON:
        return None
    if given.get("abstract", "off") in _ON:
        return None
    if given.get("fd", "").isdigit():
        return Chardev(fd=int(given["fd"]))
    if "path" in given:
        return Chardev(path=given["path"])
    port = given.get("port", "")
    if port.isdigit():
        host = given.get("host", "")
        return Chardev(host_port=(_ANY_HOST.get(host, host), int(port)))
    return None


def _legacy_chardev(text: str) -> Chardev | None:
    """Parse ``unix:PATH,server`` and ``tcp:HOST:PORT,server`` (QEMU ``chardev/char.c``)."""
    kind, _, rest = text.partition(":")
    given = key_values(rest, "address")
    address = given.pop("address", "")
    if kind == "unix":
        return _chardev(given | {"backend": "socket", "path": address})
    if kind == "tcp":
        host, _, port = address.rpartition(":")
        return _chardev(given | {"backend": "socket", "host": host.strip("[]"), "port": port})
    return None
