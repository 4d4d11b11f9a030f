"""Stores on real disks: several processes at once, ``kill -9``, and a disk that is full."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import SinkError
from stillframe.store.check import check_store
from stillframe.store.opening import make_store
from stillframe.store.records import Entry
from stillframe.store.repair import repair_store
from stillframe.store.store import Store
from tests.support.small_file_system import mounted_tmpfs
from tests.support_store.audit import audit
from tests.support_store.stores import folder_store, put
from tests.support_store.weed_server import weed_server

REPOSITORY = Path(__file__).resolve().parents[2]


def start(store: Store, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.support_store.busy_writer", store.description]
    return subprocess.Popen(
        [*words, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    assert_two_lose_nothing(folder_store(tmp_path / "store"))


def test_two_processes_at_once_lose_nothing_in_a_bucket() -> None:
    """Of a production server, whose conditional writes are what keeps them apart."""
    with weed_server() as server:
        assert_two_lose_nothing(make_store(server.url))


def assert_two_lose_nothing(store: Store) -> None:
    processes = [start(store, f"vm{number}", 12) for number in range(2)]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    ids = {word for words in told for word in words if word != "put"}
    assert len(ids) == 24
    assert set(audit(store.backend).entries) == ids
    assert check_store(store.backend, read_data=1.0).findings == ()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Of takes, tags and prunes; a second process goes on meanwhile."""
    store = folder_store(tmp_path / "store")
    bystander = start(store, "bystander")
    rng = random.Random(5)
    killed = 0
    try:
        for number in range(8):
            process = start(store, f"vm{number}")
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(rng.randrange(1, 12))]
            try:
                process.wait(rng.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            lines += process.stdout.read().splitlines()
            process.communicate(timeout=60)
            put_ids = {line.split()[1] for line in lines if line.startswith("put")}
            removed = {line.split()[1] for line in lines if line.startswith("removed")}
            assert check_store(store.backend, read_data=1.0).lost == {}
            there = {one.id for one in store.list([f"vm{number}"])}
            assert not there & removed
            if not lines[-1].startswith(("pruning", "removed")):  # else some may be gone
                assert put_ids - removed <= there
    finally:
        bystander.kill()
        bystander.communicate(timeout=60)
    assert killed == 8
    repair_store(store)
    audit(store.backend)
    assert check_store(store.backend, read_data=1.0).findings == ()


def fill(store: Store, taken: list[Entry]) -> None:
    for number in range(200):
        taken.append(put(store, created=f"2026-01-01T00:00:00.{number:06}+00:00"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "small", "size=256k") as place:
        yield place


def test_a_full_disk(small_disk: Path) -> None:
    """Whatever step finds it full, nothing is left behind, and what is there stays."""
    store = folder_store(small_disk / "store")
    for filler in range(6):
        taken: list[Entry] = []
        # Room for other than whole snapshots, so that it is full at another step each time.
        (small_disk / "other").write_bytes(bytes(filler * 3000))
        with pytest.raises(SinkError, match="No space"):
            fill(store, taken)
        assert len(taken) > 3
        assert set(audit(store.backend).entries) == {entry.id for entry in taken}
        assert check_store(store.backend, read_data=1.0).findings == ()
        (small_disk / "other").unlink()
        store.remove(taken)
        assert [one.key for one in store.backend.listing("")] == ["config"]
