"""The compaction that ``watch`` does in the background, killed and out of room."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.monitor import qmp_execute
from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import NotFoundError
from stillframe.store import compaction
from stillframe.store.store import Store
from tests.integration.test_watch import Steps, start, watch
from tests.support.bare_vm import BareVm
from tests.support.probes import has_multiboot_guest, has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.waiting import wait_until
from tests.support_store.audit import audit

pytestmark = pytest.mark.qemu
KILLS = 3
NAME = "compacted-by-watch"


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@pytest.fixture
def guest() -> Iterator[GuestVm]:
    has_multiboot_guest().require()
    with GuestVm(
        "multiboot", ram_mib=96, mem_mib=4, populate_mib=48, rate_mib_per_s=10, name=NAME
    ).start() as vm:
        yield vm


def kill_while_it_compacts(vm: Path, store: Store, after_s: float) -> None:
    """``kill -9`` so long after a whole form was begun; the chain has one file too many then."""
    process = start(vm, "--every", "0.05s")
    try:
        deadline_s = time.monotonic() + 120
        while not has_long_chain(store):
            assert time.monotonic() < deadline_s, "it does not compact"
            assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(after_s)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def has_long_chain(store: Store) -> bool:
    catalog = store.catalog()
    with contextlib.suppress(NotFoundError):  # its parent came while the folder was listed
        return any(
            len(catalog.chain(entry)) > compaction.MOST_FILES for entry in catalog.entries.values()
        )
    return False


def test_kill_9_while_it_compacts_loses_nothing(
    guest: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "store"))
    store = api.init()
    rng = random.Random(20261129)
    for _ in range(KILLS):
        kill_while_it_compacts(guest.qmp_path, store, rng.uniform(0, 0.1))
        assert guest.is_progressing()
        assert api.check(read_data=1.0).lost == {}
        before = store.list()
        assert len(before) > compaction.MOST_FILES
        steps = Steps()
        watch(guest.qmp_path, steps, 3)  # who comes next finishes it
        assert not steps.errors
        assert steps.tracked == [False, True, True]
        assert not has_long_chain(store)
        assert {entry.id for entry in before} <= {entry.id for entry in store.list()}
        assert api.check(read_data=1.0).lost == {}
        api.repair()  # enters a snapshot that was complete, and only had no entry yet
        audit(store.backend)
        assert api.check(read_data=1.0).findings == ()
        store.remove(store.list())


def _is_at_rest(vm: BareVm) -> bool:
    """Whether its BIOS is through: until then a snapshot may need more room than there is."""

    def used_ticks() -> int:
        fields = Path(f"/proc/{vm.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    words: dict[str, object] = {"command-line": "info registers"}
    if "HLT=1" not in qmp_execute(Path(vm.qmp), "human-monitor-command", words):
        return False  # nor is one that others leave no time
    before = used_ticks()
    time.sleep(0.5)
    return used_ticks() - before < 0.1 * os.sysconf("SC_CLK_TCK")


def test_without_room_for_it_snapshots_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MOST_FILES", 2)
    with (
        mounted_tmpfs(tmp_path / "small", "size=16m") as place,
        BareVm("-m", "64", name=NAME) as vm,
    ):
        wait_until(lambda: _is_at_rest(vm), within_s=60.0)
        monkeypatch.setenv("STILLFRAME_STORE", str(place / "store"))
        store = api.init()
        other = place / "other"

        def leave_little() -> None:
            (whole,) = store.list()
            room_bytes = Path(store.location(whole)).stat().st_size // 2
            free_bytes = 16 << 20
            for file in place.rglob("*"):
                free_bytes -= -(-file.stat().st_size // 4096) * 4096 if file.is_file() else 0
            other.write_bytes(bytes(free_bytes - room_bytes))

        steps = Steps(leave_little)
        watch(vm.qmp, steps, 4)
        assert steps.tracked == [False, True, True, True]
        assert steps.errors
        assert all("No space" in str(error.why) for error in steps.errors), steps.errors
        audit(store.backend)
        assert api.check(read_data=1.0).findings == ()
        other.unlink()
        watch(vm.qmp, steps, 1)
        assert not has_long_chain(store)
        assert api.check(read_data=1.0).findings == ()
