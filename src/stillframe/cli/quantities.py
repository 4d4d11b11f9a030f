"""Human-readable sizes, rates and durations: parsing and formatting."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKmMgGtTpP]?)(iB?|B)?")
_RATE_SUFFIX: Final = "/s"
_POWERS: Final = {letter: power for power, letter in enumerate("KMGTP", 1)}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST: Final = 32
_BINARY_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def parse_size(text: str) -> int:
    """Parse a size in bytes: ``268435456``, ``256M``, ``512KiB``, ``1.5G``. As in coreutils, ``M``
    and ``MiB`` are 2**20 bytes, and ``MB`` is 10**6.

    Raises:
        ValueError: not a size; the message says why.
    """
    found = _SIZE.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if found is None:
        raise ValueError("not a size; write 256M, 512KiB or 1.5G, or a number of bytes")
    number, letter, suffix = Fraction(found[1]), found[2].upper(), found[3]
    if suffix in ("i", "iB") and not letter:
        raise ValueError("not a size; KiB, MiB, GiB and TiB are units, 'iB' is none")
    base = 1000 if suffix == "B" else 1024
    size = number * base ** _POWERS.get(letter, 0)
    if size.denominator != 1 and not letter:
        raise ValueError("not a whole number of bytes")
    return int(size)


def parse_rate(text: str) -> int:
    """Parse a rate in bytes per second: a size, with or without ``/s``.

    Raises:
        ValueError: not a rate; the message says why.
    """
    try:
        return parse_size(text.strip().removesuffix(_RATE_SUFFIX))
    except ValueError:
        raise ValueError("not a rate; write 100M or 1.5GiB/s: it is in bytes per second") from None


def parse_duration(text: str) -> float:
    """Parse a duration in seconds: ``90``, ``30s``, ``10m``, ``1.5h``, ``1d``.

    Raises:
        ValueError: not a duration; the message says why.
    """
    found = _DURATION.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if found is None or not float(found[1]):
        raise ValueError("not a duration; write 30s, 10m, 1.5h or 1d, or a number of seconds")
    return float(found[1]) * _SECONDS[found[2]]


def format_bytes(count: float) -> str:
    """Format a size with about three digits: ``1.5 GiB``."""
    value, unit = float(count), 0
    while value >= 1023.95 and unit < len(_BINARY_UNITS) - 1:
        value /= 1024
        unit += 1
    if unit == 0:
        return f"{int(value)} byte" if int(value) == 1 else f"{int(value)} bytes"
    return (
        f"{value:.0f} {_BINARY_UNITS[unit]}"
        if value >= 99.95
        else (f"{value:.1f} {_BINARY_UNITS[unit]}")
    )


def format_ms(milliseconds: float) -> str:
    """Format a duration: ``4.2 ms``, ``1.3 s``, ``2 min 5 s``."""
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms" if milliseconds >= 99.95 else f"{milliseconds:.1f} ms"
    return format_seconds(milliseconds / 1000)


def format_seconds(seconds: float) -> str:
    """Format a duration: ``1.3 s``, ``42 s``, ``2 min 5 s``, ``3 h 7 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
