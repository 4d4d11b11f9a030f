"""The host's checks: they try the thing itself, and a failure carries its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest

from stillframe.cli.main import main
from stillframe.doctor import host
from stillframe.doctor.checks import Check
from stillframe.errors import HostError


def _named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def _refuse(*_: object) -> NoReturn:
    raise HostError("it is not allowed here", why="a policy", remedy="ask somebody")


def test_every_check_has_a_finding(tmp_path: Path) -> None:
    checks = host.host_checks(tmp_path)
    assert [check.name for check in checks] == [
        "kernel",
        "userfaultfd",
        "ptrace",
        "attach",
        "seccomp",
        "memfd",
        "zstd",
        "qemu",
        "board",
        "space",
    ]
    for check in checks:
        assert check.subject == "host"
        assert check.found
        assert bool(check.remedy) is (check.status != "ok"), check


def test_a_failure_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "attach", _refuse)
    checks = host.host_checks(tmp_path)
    assert _named(checks, "attach").status == "fail"
    assert _named(checks, "attach").found == "it is not allowed here: a policy"
    assert _named(checks, "attach").remedy == "ask somebody"
    # Only VMs under -sandbox need this one.
    assert _named(checks, "seccomp").status == "warn"
    assert main(["doctor", "--json"]) == 5
    shown = json.loads(capsys.readouterr().out)
    assert shown["fine"] is False
    assert main(["doctor"]) == 5
    assert "fail  attach" in capsys.readouterr().out


def test_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = _named(host.host_checks(tmp_path), "qemu")
    assert check.status == "warn"
    assert "apt-get install" in check.remedy


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.4.0", "ok"), ("6.18.44-custom", "ok"), ("7.0-rc1", "ok"), ("6.3.9", "warn")],
)
def test_kernel(release: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    assert _named(host.host_checks(tmp_path), "kernel").status == status


def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_LITTLE_SPACE_BYTES", 1 << 60)
    assert _named(host.host_checks(tmp_path), "space").status == "warn"
    assert _named(host.host_checks(tmp_path / "none"), "space").status == "warn"
