"""Shell completion, asked for as bash does."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from stillframe.cli.main import main


def _complete(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setenv("_STILLFRAME_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with contextlib.suppress(SystemExit):
        main([])
    lines = capsys.readouterr().out.splitlines()
    return [line.partition(",")[2] for line in lines if line]


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _complete("stillframe e", monkeypatch, capsys) == ["export"]


def test_vms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    vms = [SimpleNamespace(name="web1", pid=7), SimpleNamespace(name="", pid=8)]
    monkeypatch.setattr("stillframe.api.list_vms", lambda: vms)
    assert _complete("stillframe take ", monkeypatch, capsys) == ["web1", "8"]
    assert _complete("stillframe take w", monkeypatch, capsys) == ["web1"]


def test_compression(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = _complete("stillframe take x --compression n", monkeypatch, capsys)
    assert found == ["none"]


def test_blocks_of_a_missing_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _complete("stillframe export /nonexistent --block p", monkeypatch, capsys)
    assert found == []


def test_guests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _complete("stillframe board run l", monkeypatch, capsys) == ["ledger", "life"]
    assert _complete("stillframe board r", monkeypatch, capsys) == ["run"]
