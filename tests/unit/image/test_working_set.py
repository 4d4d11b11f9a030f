"""The working set beside a snapshot: bounded, of this snapshot, whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stillframe.image.working_set import (
    MOST_FRAMES,
    load_working_set,
    save_working_set,
    working_set_path,
)

ID = "a" * 64


def test_it_comes_back_in_order_without_doubles(tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    assert save_working_set(file, ID, [5, 3, 5, 9])
    assert load_working_set(file, ID, 10) == [5, 3, 9]
    assert load_working_set(file, ID, 9) == [5, 3]
    assert os.listdir(tmp_path) == ["x.still.working-set"]
    assert working_set_path(file).stat().st_mode & 0o777 == 0o600


def test_of_another_snapshot_or_damaged_it_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    assert load_working_set(file, ID, 10) == []
    assert save_working_set(file, ID, [1])
    assert load_working_set(file, "b" * 64, 10) == []
    for content in (b"", b"{", b"[]", b"\xff", b'{"snapshot":"x","frames":["a"]}', b"[" * 100000):
        working_set_path(file).write_bytes(content)
        assert load_working_set(file, ID, 10) == []
    frames = {"format": 1, "snapshot": ID, "frames": [-1, 1 << 40, 2]}
    working_set_path(file).write_text(json.dumps(frames))
    assert load_working_set(file, ID, 10) == [2]


def test_it_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    assert save_working_set(file, ID, range(3 * MOST_FRAMES))
    assert load_working_set(file, ID, 3 * MOST_FRAMES) == list(range(MOST_FRAMES))


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert not save_working_set(tmp_path / "none" / "x.still", ID, [1])
