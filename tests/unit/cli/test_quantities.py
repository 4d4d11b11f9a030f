"""Sizes, rates and durations."""

from __future__ import annotations

import pytest

from stillframe.cli.quantities import (
    format_bytes,
    format_ms,
    format_seconds,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("256 MiB", 256 << 20),
        ("512KiB", 512 << 10),
        ("512Ki", 512 << 10),
        ("1.5G", 3 << 29),
        ("0.3K", 307),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("1MB", 10**6),
        ("1.5kB", 1500),
        ("7B", 7),
        (" 1K ", 1024),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M",
        "-1",
        "-1M",
        "+1M",
        "1.5",
        "1,5M",
        "1.M",
        ".5M",
        "1e9",
        "0x10",
        "1iB",
        "1i",
        "12Mbit",
        "1MM",
        "1Z",
        "inf",
        "nan",
        "\u0661M",
        "9" * 5000,
        "1M\n\n1",
    ],
)
def test_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a (size|whole number)"):
        parse_size(text)


def test_rate() -> None:
    assert parse_rate("100M") == parse_rate("100M/s") == parse_rate("100MiB/s") == 100 << 20
    for bad in ("100Mbit", "100M/h", "/s", ""):
        with pytest.raises(ValueError, match="bytes per second"):
            parse_rate(bad)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 << 10, "200 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_format_durations() -> None:
    assert format_ms(0.04) == "0.0 ms"
    assert format_ms(4.24) == "4.2 ms"
    assert format_ms(720) == "720 ms"
    assert format_ms(999.9) == "1.0 s"
    assert format_seconds(9.99) == "10 s"
    assert format_seconds(59.7) == "1 min 0 s"
    assert format_seconds(125) == "2 min 5 s"
    assert format_seconds(11220) == "3 h 7 min"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("10m", 600), ("10 m", 600), ("1.5h", 5400), ("1d", 86400)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "m", "1w", "soon", "1h30m", "9" * 99])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)
