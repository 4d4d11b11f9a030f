"""Where the command line takes passphrases and keys from, and what it says without them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyrage.x25519
import pytest

from stillframe import api
from stillframe.cli.main import main
from stillframe.errors import NotFoundError
from stillframe.store import keys as keys_room
from tests.support_store.sealed import sealed_file
from tests.support_store.small import small_file


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    for name in ("", "_FILE", "_COMMAND"):
        monkeypatch.delenv(f"STILLFRAME_PASSWORD{name}", raising=False)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "x.still"
    path.write_bytes(sealed_file(key=api.make_key(passphrase="päss word")))
    return path


def shown(file: Path, *options: str) -> int:
    return main(["show", str(file), "--json", *options])


def test_a_passphrase_from_a_file_or_the_environment(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    word = tmp_path / "word"
    word.write_text("päss word\n")
    assert shown(sealed, "--password-file", str(word)) == 0
    assert json.loads(capsys.readouterr().out)["encrypted"] is True
    for name, value in (
        ("STILLFRAME_PASSWORD", "päss word"),
        ("STILLFRAME_PASSWORD_FILE", str(word)),
        ("STILLFRAME_PASSWORD_COMMAND", f"cat '{word}'"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert shown(sealed) == 0
    assert main(["verify", str(sealed), "-q", "--password-file", str(word)]) == 0
    block = ["--format", "raw", "--block", "pc.bios", "-o", str(tmp_path / "bios")]
    assert main(["export", str(sealed), *block, "--password-file", str(word), "-q"]) == 0
    assert (tmp_path / "bios").stat().st_size == 3 * 4096


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({}, 12, "is encrypted; give its passphrase (--password-file, STILLFRAME_PASSWORD)"),
        ({"STILLFRAME_PASSWORD": "wrong"}, 12, "wrong passphrase for "),
        ({"STILLFRAME_PASSWORD": ""}, 2, "the passphrase is empty"),
        ({"STILLFRAME_PASSWORD_FILE": "/nonexistent"}, 9, "there is no file /nonexistent"),
        ({"STILLFRAME_PASSWORD_FILE": "/"}, 5, "cannot read /: Is a directory"),
        ({"STILLFRAME_PASSWORD_COMMAND": "false"}, 5, "STILLFRAME_PASSWORD_COMMAND does not"),
        ({"STILLFRAME_PASSWORD_COMMAND": "'"}, 5, "STILLFRAME_PASSWORD_COMMAND does not"),
    ],
)
def test_no_passphrase_or_a_wrong_one(
    environment: dict[str, str], code: int, words: str, sealed: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["show", str(sealed)]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert main(["restore", str(sealed)]) == code


def test_an_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = pyrage.x25519.Identity.generate()
    path, file = tmp_path / "identity", tmp_path / "x.still"
    path.write_text(f"{new}\n")
    file.write_bytes(sealed_file(key=api.make_key(recipients=[str(new.to_public())])))
    assert shown(file, "--identity", str(path)) == 0
    path.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    assert shown(file, "--identity", str(path)) == 12
    assert "no identity that was given opens" in capsys.readouterr().err


def test_it_asks_on_a_terminal(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[dict[str, Any]] = []

    def prompt(text: str, **options: Any) -> str:
        asked.append(options)
        return "päss word"

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("click.prompt", prompt)
    assert shown(sealed) == 0
    assert asked == [{"hide_input": True, "confirmation_prompt": False, "err": True}]


def test_a_plain_file_where_a_key_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, word = tmp_path / "plain.still", tmp_path / "word"
    plain.write_bytes(small_file())
    word.write_text("pass")
    assert shown(plain, "--password-file", str(word)) == 2
    assert "is not encrypted" in capsys.readouterr().err
    monkeypatch.setenv("STILLFRAME_PASSWORD", "pass")
    assert shown(plain) == 0


def test_what_take_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[api.DataKey | None] = []

    def take(vm: str, output: object, *, key: api.DataKey | None, **options: Any) -> None:
        seen.append(key)
        raise NotFoundError("seen")

    monkeypatch.setattr("stillframe.api.take", take)
    words = ["take", "web1", "-o", str(tmp_path / "x")]
    assert main([*words, "--encrypt"]) == 2
    said = capsys.readouterr().err
    assert "there is no passphrase to encrypt with" in said
    assert "--password-file" in said
    assert said.count("\n") == 1
    assert main([*words, "--password-file", "x"]) == 2
    assert main([*words, "--recipient", "age1nonsense"]) == 2
    assert seen == []
    assert main(words) == 9
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    monkeypatch.setenv("STILLFRAME_PASSWORD", "pass")
    assert main([*words, "--encrypt", "--recipient", recipient]) == 9
    assert seen[0] is None
    assert seen[1] is not None
    assert [slot["kind"] for slot in json.loads(seen[1].slots)] == ["scrypt", "age"]


def test_no_save_image_in_the_clear_beside_an_encrypted_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STILLFRAME_PASSWORD", "pass")
    words = ["take", "web1", "-o", str(tmp_path / "x"), "--encrypt", "--libvirt-snapshot", "one"]
    assert main(words) == 2
    assert "would not be encrypted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
