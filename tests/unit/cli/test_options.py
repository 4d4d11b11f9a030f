"""What the parser lets through to the API, and what it refuses."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

import pytest

from stillframe.cli.main import main
from stillframe.errors import NotFoundError


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keeps what ``take`` asks of the API."""
    asked: dict[str, Any] = {}

    def take(vm: str, output: object, **options: Any) -> None:
        asked.update(options, vm=vm, output=output)
        raise NotFoundError("seen")

    monkeypatch.setattr("stillframe.api.take", take)
    return asked


def test_defaults(taken: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["take", "web1", "-o", "x.still"]) == 9
    del taken["on_progress"]
    assert taken == {
        "vm": "web1",
        "output": "x.still",
        "compression": "zstd",
        "level": None,
        "spill_bytes": 256 << 20,
        "disks": "copy",
        "disks_directory": None,
        "max_drain_ms": 100.0,
        "quiesce": False,
        "libvirt_snapshot": None,
        "image": False,
        "key": None,
        "keys": ANY,
        "max_bandwidth_bytes_per_s": None,
        "for_analysis": False,
        "mode": "background",
        "parent": None,
        "arm": True,
        "overwrite": False,
        "tags": (),
        "full": False,
    }


def test_everything(taken: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = "take 4711 --output x --compression zstd:-3 --spill 1.5G --max-bandwidth 100M/s"
    assert main([*words.split(), "--mode", "stop", "--no-arm", "--force", "-q"]) == 9
    assert taken["compression"] == "zstd"
    assert taken["level"] == -3
    assert taken["spill_bytes"] == 3 << 29
    assert taken["max_bandwidth_bytes_per_s"] == 100 << 20
    assert (taken["mode"], taken["arm"], taken["overwrite"]) == ("stop", False, True)
    assert capsys.readouterr().err == "stillframe: seen\n"


def test_no_compression(taken: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["take", "x", "-o", "y", "--compression", "none"]) == 9
    assert (taken["compression"], taken["level"]) == ("none", None)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--spill", "0", "it must be 1.0 MiB to 1.0 TiB"),
        ("--spill", "-1M", "not a size"),
        ("--spill", "100P", "it must be"),
        ("--spill", "many", "not a size"),
        ("--max-bandwidth", "0", "it must be 1.0 KiB to 1.0 TiB"),
        ("--max-bandwidth", "100Mbit", "bytes per second"),
        ("--compression", "gzip", "write zstd"),
        ("--compression", "zstd:", "write zstd"),
        ("--compression", "zstd:20", "write zstd"),
        ("--compression", "zstd:-51", "write zstd"),
        ("--compression", "zstd:1.5", "write zstd"),
        ("--compression", "none:3", "write zstd"),
        ("--mode", "fast", "'fast' is not one of"),
    ],
)
def test_refused(
    option: str, value: str, words: str, taken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["take", "x", "-o", "y", option, value]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert option in err
    assert err.count("\n") == 1
    assert not taken


def test_every_form_of_export_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    from stillframe import api

    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in api.EXPORT_FORMATS)
