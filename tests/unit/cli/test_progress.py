"""Progress as plain lines, and what chooses it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from stillframe.cli import progress as subject


def test_a_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    shown = subject.PlainProgress()
    for phase, done in (("arming", 0), ("saving", 1), ("saving", 2), ("syncing", 9)):
        shown.show(phase, done, 10, "details")
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "stillframe: arming",
        "stillframe: saving",
        "stillframe: syncing",
    ]


def test_a_line_now_and_then_within_a_phase(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("stillframe.cli.progress.time.monotonic", lambda: now[0])
    shown = subject.PlainProgress()
    for _ in range(12):
        shown.show("saving", 1 << 20, 4 << 20, "5 faults")
        now[0] += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "stillframe: saving",
        "stillframe: saving, 25 % (1.0 MiB of 4.0 MiB), 5 faults",
        "stillframe: saving, 25 % (1.0 MiB of 4.0 MiB), 5 faults",
    ]


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("stillframe.cli.progress.time.monotonic", lambda: now[0])
    seen: list[tuple[object, ...]] = []

    class Recorder:
        animated = False

        def show(self, *state: object) -> None:
            seen.append(state)

        def close(self) -> None: ...

    rate = subject.ByteRate(Recorder(), "verifying")
    now[0] = 0.5
    rate.update(1 << 20, 4 << 20)
    now[0] = 2.0
    rate.update(2 << 20, 4 << 20)
    rate.update(3 << 20, 4 << 20)
    assert seen == [
        ("verifying", 1 << 20, 4 << 20, "2.0 MiB/s"),
        ("verifying", 2 << 20, 4 << 20, "1.0 MiB/s, 2.0 s left"),
    ]


def test_amount() -> None:
    assert subject.amount(0, None) == "0 bytes"
    assert subject.amount(3, 2) == "100 % (3 bytes of 2 bytes)"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "quiet", "animated", "silent"),
    [
        (_Terminal(), "xterm", False, True, False),
        (_Terminal(), "dumb", False, False, False),
        (io.StringIO(), "xterm", False, False, False),
        (_Terminal(), "xterm", True, False, True),
    ],
)
def test_choice(
    stream: io.StringIO,
    term: str,
    quiet: bool,
    animated: bool,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", term)
    chosen = subject.choose_progress(quiet=quiet)
    chosen.show("saving", 1, 2, "details")
    chosen.close()
    assert chosen.animated is animated
    assert (stream.getvalue() == "") is silent


def test_a_full_standard_error_is_no_failure() -> None:
    code = "from stillframe.cli.output import say; say('x'); say('y'); print('done')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, timeout=120
        )
    assert done.stdout == b"done\n"
