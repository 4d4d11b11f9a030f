"""The public functions: what they refuse before anything is touched, and how a job is followed."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest

import stillframe
from stillframe import api
from stillframe.errors import DataError, NotFoundError, SinkError, UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spill_bytes": 0}, "spill"),
        ({"max_bandwidth_bytes_per_s": -1}, "bandwidth"),
        ({"mode": "fast"}, "mode"),
        ({"compression": "gzip"}, "compression"),
        ({"compression": "none", "level": 3}, "has no level"),
        ({"level": 20}, "compression level"),
    ],
)
def test_take_refuses(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        stillframe.take("no-such-vm", tmp_path / "a.still", **options)
    assert list(tmp_path.iterdir()) == []


def test_take_opens_the_destination_first(tmp_path: Path) -> None:
    (tmp_path / "a.still").touch()
    with pytest.raises(UsageError, match="exists already"):
        stillframe.take("no-such-vm", tmp_path / "a.still")
    with pytest.raises(SinkError, match="directory"):
        stillframe.take("no-such-vm", tmp_path / "none" / "a.still")


def test_a_failed_job_leaves_nothing(tmp_path: Path) -> None:
    phases: list[str] = []
    job = stillframe.take(
        "no-such-vm", tmp_path / "a.still", on_progress=lambda now: phases.append(now.phase)
    )
    with pytest.raises(NotFoundError, match="no-such-vm"):
        job.wait(30)
    assert job.state == "failed"
    assert phases == ["connecting"]
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_awaited_without_blocking_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def follow() -> int:
        ticks = 0
        job = stillframe.take("no-such-vm", tmp_path / "a.still")
        task = asyncio.ensure_future(_wait(job))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            await task
        return ticks

    async def _wait(job: stillframe.api.SnapshotJob) -> None:
        await job

    def slow(*_: object, **__: object) -> None:
        import time

        time.sleep(0.5)
        raise NotFoundError("gone")

    monkeypatch.setattr(api, "connect", slow)
    assert asyncio.run(follow()) > 10


def test_open_and_verify_what_is_not_there(tmp_path: Path) -> None:
    for function in (stillframe.open, stillframe.verify, stillframe.restore):
        with pytest.raises(NotFoundError):
            function(tmp_path / "none")


def test_export_refuses(tmp_path: Path) -> None:
    wrong: Any = "zip"
    with pytest.raises(UsageError, match="format"):
        stillframe.export(tmp_path / "none", tmp_path / "x", format=wrong)
    with pytest.raises(UsageError, match="holds all blocks"):
        stillframe.export(tmp_path / "none", tmp_path / "x", format="elf", block="pc.ram")
    with pytest.raises(NotFoundError):
        stillframe.export(tmp_path / "none", tmp_path / "x", format="raw")
    assert list(tmp_path.iterdir()) == []


def test_import_refuses(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        stillframe.import_stream(tmp_path / "none", tmp_path / "x")
    with pytest.raises(UsageError, match="is a directory"):
        stillframe.import_stream(tmp_path, tmp_path / "x")
    with pytest.raises(DataError):
        stillframe.import_stream(io.BytesIO(b"no stream"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
