"""Displays: ports move, terminals and viewers are left out.

Sources: QEMU ``qemu-options.hx`` (-display, -vnc, -spice), ``ui/vnc.c``.
"""

from __future__ import annotations

from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue

_MORE_DISPLAYS = 99
_TAKEN = "the first VM may have the port"


def vnc(draft: Draft, option: Option) -> None:
    """``-vnc``: the next free port."""
    value = OptionValue(option.value, "vnc")
    address = value.get("vnc")
    if address.startswith("unix:"):
        value.drop("websocket")
        value.set("vnc", f"unix:{draft.private_socket('vnc', option)}")
        draft.replace(option, (option.words[0], value.text), "private now")
        return
    number = address.rpartition(":")[2]
    if number.isdigit() and len(number) < 6:
        if value.is_on("reverse"):
            draft.touch("network", "connect", address, option)
            draft.keep(option)
            return
        value.set("to", str(int(number) + _MORE_DISPLAYS))
        if value.get("websocket"):
            value.set("websocket", True)
        draft.touch("network", "listen", f"VNC display {address} or the next free", option)
        draft.replace(option, (option.words[0], value.text), _TAKEN)
        return
    draft.keep(option)


def spice(draft: Draft, option: Option) -> None:
    """``-spice``: a private unix socket."""
    value = OptionValue(option.value, "")
    value.drop("port", "tls-port", "addr", "ipv4", "ipv6", "unix")
    value.set("unix", True)
    value.set("addr", draft.private_socket("spice", option))
    draft.scan(option, value, known=("addr",))
    draft.replace(option, (option.words[0], value.text), _TAKEN)


def display(draft: Draft, option: Option) -> None:
    """``-display``."""
    value = OptionValue(option.value, "type")
    kind = value.get("type")
    if kind == "vnc" or option.value.startswith("vnc="):
        words = ("-vnc", option.value.removeprefix("vnc="))
        vnc(draft, Option(name="vnc", value=words[1], words=words))
    elif kind in ("curses", "spice-app"):
        draft.replace(option, ("-display", "none"), "no terminal or viewer is opened")
    else:
        draft.scan(option, value)
        draft.keep(option)


def curses(draft: Draft, option: Option) -> None:
    """``-curses``."""
    draft.replace(option, ("-display", "none"), "no terminal is taken")


def audio(draft: Draft, option: Option) -> None:
    """``-audiodev`` and ``-audio``: a WAV file is one of our own."""
    value = OptionValue(option.value, "driver")
    if value.get("driver") == "wav":
        value.set("path", draft.private_file(value.get("id") or "audio", option))
        draft.replace(option, (option.words[0], value.text), "the first VM writes that file")
        return
    draft.scan(option, value, known=("id",))
    draft.keep(option)
