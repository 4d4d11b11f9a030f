"""Displays and sound: ports move, terminals and viewers are left out.

Sources: QEMU ``qemu-options.hx`` (-display, -vnc, -spice), ``ui/vnc.c``, ``qapi/audio.json``.
"""

from __future__ import annotations

import re

from stillframe.restore.builder import UNKNOWN, Builder
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_MORE_DISPLAYS = 99
_TAKEN = "the first VM may have the port"
_VNC_KEYS = ("vnc", "id", "display", "share", "password-secret", "audiodev",
             "websocket", "tls-creds", "tls-authz", "sasl-authz")  # fmt: skip
_SPICE_WORDS = """
disable-ticketing password password-secret image-compression jpeg-wan-compression
zlib-glz-wan-compression streaming-video agent-mouse playback-compression seamless-migration
plaintext-channel disable-copy-paste disable-agent-file-xfer gl max-refresh-rate
"""
_SPICE_KEYS = tuple(_SPICE_WORDS.split())
_SPICE_TEXTS = (*_SPICE_KEYS, "addr", "unix")
_DISPLAY_TEXTS = ("type", "grab-mod", "alt_grab", "ctrl_grab")
_DISPLAY_HOST = ("clipboard", "addr", "p2p", "rendernode")
_WINDOWS = ("gtk", "sdl", "cocoa", "default")
_WINDOW = "a window on the host's display"
_QUIET_AUDIO = ("none", "spice", "dbus", "wav")
_AUDIO_TEXTS = ("driver", "id", "model", "in.format", "out.format")
_AUDIO_HOST = ("in.dev", "out.dev", "server", "in.name", "out.name", "path")


def vnc(builder: Builder, option: Option) -> None:
    """``-vnc``: the next free port."""
    value = OptionValue(option.value, "vnc", json=False)
    address = value.get("vnc")
    if len(value.all("vnc")) > 1:
        builder.risk(option, "it has several addresses")
    number = re.search(r":(\d{1,5})$", address, re.ASCII)
    if address.startswith("unix:"):
        value.drop("websocket")
        value.set("vnc", f"unix:{builder.private_socket('vnc', option)}")
        reason = "private now"
    elif value.is_on("reverse"):
        builder.touch("network", "connect", address, option)
        reason = ""
    elif number is not None:
        value.set("to", str(int(number[1]) + _MORE_DISPLAYS))
        if value.get("websocket"):
            value.set("websocket", True)
        builder.touch("network", "listen", f"VNC display {address} or the next free", option)
        reason = _TAKEN
    else:
        reason = ""
        value.drop("websocket")
        if address != "none":
            builder.risk(option, UNKNOWN)
    builder.judge(option, value, plain=_VNC_KEYS, host=("sasl",))
    builder.replace(option, ("-vnc", value.text), reason)


def spice(builder: Builder, option: Option) -> None:
    """``-spice``: a private unix socket, which needs no TLS."""
    value = OptionValue(option.value, "", json=False)
    value.drop("port", "tls-port", "addr", "ipv4", "ipv6", "unix", "tls-channel", "tls-ciphers")
    value.drop("x509-dir", "x509-key-file", "x509-key-password", "x509-cert-file")
    value.drop("x509-cacert-file", "x509-dh-key-file")
    value.set("unix", True)
    value.set("addr", builder.private_socket("spice", option))
    if value.is_on("gl"):
        builder.touch("device", "write", value.get("rendernode") or "/dev/dri", option)
    builder.judge(option, value, plain=_SPICE_TEXTS, files=("rendernode",), host=("sasl",))
    builder.set_value(option, value, _TAKEN)


def display(builder: Builder, option: Option) -> None:
    """``-display``."""
    value = option.parsed()
    kind = value.get("type")
    if kind == "vnc" or option.value.startswith("vnc="):
        words = ("-vnc", option.value.removeprefix("vnc="))
        vnc(builder, Option(name="vnc", value=words[1], words=words))
    elif kind in ("curses", "spice-app"):
        builder.replace(option, ("-display", "none"), "no terminal or viewer is opened")
    else:
        if kind not in ("none", *_WINDOWS, "egl-headless", "dbus"):
            builder.risk(option, f"Stillframe does not know the display {kind}")
        if kind in _WINDOWS:
            builder.touch("device", "write", _WINDOW, option)
        if kind in ("egl-headless", "dbus") or value.get("gl", "off") != "off":
            builder.touch("device", "write", value.get("rendernode") or "/dev/dri", option)
        builder.judge(option, value, plain=_DISPLAY_TEXTS, host=_DISPLAY_HOST)
        builder.keep(option)


def default_display(builder: Builder) -> None:
    """Note QEMU's display if no option names one: a window, or VNC (``system/vl.c``)."""
    names = {option.name for option in (*builder.recorded, *builder.own)}
    if not names & {"display", "vnc", "spice", "nographic", "curses", "sdl"}:
        target = f"{_WINDOW}, or VNC on 127.0.0.1, the first free port from 5900 on"
        builder.touch("network", "listen", target, "QEMU's default display")


def curses(builder: Builder, option: Option) -> None:
    """``-curses``."""
    builder.replace(option, ("-display", "none"), "no terminal is taken")


def audio(builder: Builder, option: Option) -> None:
    """``-audiodev`` and ``-audio``: a WAV file becomes one of our own."""
    value = option.parsed()
    driver = value.get("driver")
    texts = set(_AUDIO_TEXTS)
    if driver == "wav":
        value.set("path", builder.private_file(value.get("id") or "audio", option))
        texts.add("path")
    elif driver not in _QUIET_AUDIO:
        builder.touch("device", "write", f"the host's sound, by {driver}", option)
    builder.judge(option, value, plain=texts, host=set(_AUDIO_HOST) - texts)
    builder.set_value(option, value, "the first VM writes that file")


def old_audio(builder: Builder, option: Option) -> None:
    """``-soundhw``, which takes what sound the host has."""
    if not re.fullmatch(r"none|pcspk", option.value):
        builder.touch("device", "write", "the host's sound, if QEMU finds any", option)
    builder.keep(option)
