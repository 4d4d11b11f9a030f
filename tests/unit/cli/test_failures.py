"""Errors become one line, JSON, and an exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from stillframe import errors
from stillframe.cli import failures
from stillframe.cli.main import cli, main

Fail = Callable[[BaseException], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Makes ``stillframe ps`` raise what is given."""

    def prepare(error: BaseException) -> None:
        def raise_it() -> None:
            raise error

        monkeypatch.setattr("stillframe.api.survey", raise_it)

    return prepare


def _errors() -> list[type[errors.StillframeError]]:
    return errors.StillframeError.__subclasses__()


@pytest.mark.parametrize("kind", _errors(), ids=lambda kind: kind.__name__)
def test_each_error_has_its_exit_code_and_one_line(
    kind: type[errors.StillframeError], failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(kind("it broke", why="a reason", remedy="mend it", guest_state="running"))
    assert main(["ps"]) == kind.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "stillframe: it broke: a reason; mend it [guest running]\n"


def test_no_guest_no_word_of_it(failing: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    failing(errors.DataError("it is damaged", offset_bytes=7))
    assert main(["ps"]) == 8
    assert capsys.readouterr().err == "stillframe: it is damaged (at byte 7)\n"


def test_each_reason_of_a_refusal_has_a_line(
    failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = (("vfio", "it writes", "unplug it"), ("rdma", "it writes too", "unplug that"))
    failing(errors.RefusedError("vfio (and 1 more)", reasons=reasons))
    assert main(["ps"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "stillframe: vfio: it writes; unplug it [guest running]",
        "stillframe: rdma: it writes too; unplug that [guest running]",
    ]


def test_json_error_is_on_standard_output(
    failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(errors.RefusedError("no", why="w", reasons=(("vfio", "it writes", "unplug it"),)))
    assert main(["ps", "--json"]) == 3
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown == {
        "error": "refused",
        "what": "no",
        "why": "w",
        "remedy": None,
        "guest_state": "running",
        "exit_code": 3,
        "reasons": [{"name": "vfio", "reason": "it writes", "remedy": "unplug it"}],
    }
    assert err.startswith("stillframe: no: w")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), OSError("y"), RecursionError(), AssertionError("z"), UnicodeError("u")],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_is_an_internal_error_without_a_traceback(
    error: Exception, failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert main(["ps"]) == 70
    err = capsys.readouterr().err
    assert err.startswith(f"stillframe: unexpected {type(error).__name__}")
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_out_of_memory(failing: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    failing(MemoryError())
    assert main(["ps"]) == 70
    assert "out of memory" in capsys.readouterr().err


def test_traceback_when_it_is_asked_for(
    failing: Fail, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLFRAME_DEBUG", "1")
    failing(errors.HostError("no kernel"))
    assert main(["ps"]) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("stillframe: no kernel\n")


def test_hostile_words_are_escaped(failing: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    failing(errors.DataError("block \x1b]0;owned\x07 is\nodd"))
    main(["ps"])
    assert capsys.readouterr().err == "stillframe: block \\x1b]0;owned\\x07 is\\nodd\n"


def test_interrupted(
    failing: Fail, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not once more, while the program says so and ends."""
    failing(KeyboardInterrupt())
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        assert main(["ps"]) == 130
        assert signal.SIG_IGN not in [signal.getsignal(number) for number in numbers]
        monkeypatch.setattr(sys, "argv", ["stillframe", "ps"])
        assert main() == 130
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == "stillframe: cancelled\n" * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "no such command"),
        (["take"], "missing argument"),
        (["copy"], "missing option"),
        (["take", "x", "-o", "y", "--nope"], "no such option"),
        (["--nope"], "no such option"),
        (["export", "f", "-o", "x", "--format", "zip"], "'zip' is not one of"),
        (["export", "f", "-o", "x"], "missing option '--format'. Choose from: qemu, raw, elf, "),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("stillframe: ")
    assert words in err
    assert err.rstrip().endswith("--help'")
    assert err.count("\n") == 1


def test_wrong_call_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "usage"


def test_json_after_two_dashes_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_usage_error_names_the_command() -> None:
    context = click.Context(click.Command("take"), info_name="take", parent=click.Context(cli))
    known = failures.classify_error(click.UsageError("Bad.", context))
    assert isinstance(known, errors.UsageError)
    assert known.what == "bad"


def test_the_systems_number_of_an_error_is_not_told(
    failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(errors.HostError("it broke", why=str(OSError(13, "Permission denied", "/x"))))
    assert main(["ps"]) == 5
    assert capsys.readouterr().err == "stillframe: it broke: Permission denied: '/x'\n"


@pytest.mark.parametrize("words", [("--help",), ("take", "--help"), ("--version",)])
def test_help_on_a_full_standard_output(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stillframe", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.returncode == 7
    assert done.stderr == (
        b"stillframe: standard output cannot be written: No space left on device\n"
    )


def test_a_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stillframe", "ps", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.returncode == 7
    assert done.stderr == (
        b"stillframe: the result cannot be written to standard output: No space left on device\n"
    )
