"""When an image was complete is said beside its record, and believed only if it is a moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stillframe.image.fill_record import complete_s, note_complete


def test_the_moment_comes_back(tmp_path: Path) -> None:
    record = tmp_path / "image.json"
    assert complete_s(record) is None
    began_s = time.monotonic()
    for _ in range(2):  # also by somebody else again
        note_complete(record)
        moment_s = complete_s(record)
        assert moment_s is not None
        assert began_s - 1e-3 <= moment_s <= time.monotonic() + 1e-3
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"soon", b"nan", b"inf", b"\xff\xfe"])
def test_what_is_no_moment_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.complete").write_bytes(content)
    assert complete_s(tmp_path / "image.json") is None


def test_nobody_waits_at_a_pipe_or_follows_a_link(tmp_path: Path) -> None:
    """The directory may be another user's, for whom root fills."""
    record, place = tmp_path / "image.json", tmp_path / "image.complete"
    os.mkfifo(place)
    assert complete_s(record) is None
    victim = tmp_path / "victim"
    victim.write_text("1.0")
    place.unlink()
    place.symlink_to(victim)
    assert complete_s(record) is None
    note_complete(record)
    assert complete_s(record) is not None
    assert victim.read_text() == "1.0"


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    note_complete(tmp_path / "none" / "image.json")
