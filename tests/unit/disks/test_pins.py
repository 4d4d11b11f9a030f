"""Pins beside overlays: what needs an image is never taken for gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillframe.disks.pins import PIN, is_nobodys, pin, pinned_by, unpin
from tests.support.small_file_system import mounted_tmpfs


def test_a_snapshot_that_was_removed_needs_nothing(tmp_path: Path) -> None:
    overlay, snapshot = str(tmp_path / "disk.qcow2"), tmp_path / "x.still"
    pin(overlay, str(snapshot), pending=True)
    assert is_nobodys(overlay)
    snapshot.write_bytes(b"not one that can be read")
    assert pinned_by(overlay) == str(snapshot)
    assert not is_nobodys(overlay)
    snapshot.unlink()
    assert pinned_by(overlay) is None
    unpin(overlay)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", bytes(50)], ids=["empty", "cut off", "other", "zeroes"]
)
def test_a_pin_that_cannot_be_read_holds(tmp_path: Path, content: bytes) -> None:
    """Such as one of a host that went down as it was written."""
    overlay = str(tmp_path / "disk.qcow2")
    Path(overlay + PIN).write_bytes(content)
    assert pinned_by(overlay) is not None
    assert not is_nobodys(overlay)


def test_one_that_fails_leaves_the_old_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = str(tmp_path / "disk.qcow2")
    (tmp_path / "x.still").touch()
    pin(overlay, str(tmp_path / "x.still"), pending=False)

    def fsync(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Exception, match="cannot write"):
        pin(overlay, str(tmp_path / "y.still"), pending=False)
    monkeypatch.undo()
    assert pinned_by(overlay) == str(tmp_path / "x.still")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.qcow2.pin", "x.still"]


def test_a_snapshot_whose_disk_is_not_mounted_holds(tmp_path: Path) -> None:
    overlay, place = str(tmp_path / "disk.qcow2"), tmp_path / "backup"
    with mounted_tmpfs(place, "size=1m"):
        (place / "x.still").touch()
        pin(overlay, str(place / "x.still"), pending=True)
    place.mkdir(exist_ok=True)
    assert pinned_by(overlay) == str(place / "x.still")
    assert not is_nobodys(overlay)
