"""Clones of a running board: each goes on by itself, whoever else ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe import api
from stillframe.errors import MachineError
from stillframe.image.start import Started
from stillframe.restore.feed import Progress
from stillframe.restore.restored import FORK_PREFIX, FORKS, RestoredVm, list_restored
from stillframe.restore.start import Restoring
from tests.integration.cli.program import run
from tests.support.board_process import BoardProcess, Console, end, ledger, transfers
from tests.support.probes import has_uffd_wp
from tests.support.waiting import wait_until

RAM = 16 << 20


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: Path) -> Path:
    """Where the clones' disks go: this test's own, so that what is left can be seen."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "stillframe" / "restored"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardProcess]:
    """The ledger on two vCPUs, with a disk, in a process of its own."""
    has_uffd_wp().require()
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    words = ("--ram", RAM, "--cpus", 2, "--disk", disk)
    with ledger(*words, options="rate=20 dma=entropy tick_ms=100") as running:
        yield running


def audit(vm: RestoredVm) -> str:
    """What the ledger of a clone answers."""
    console = Console(next(Path(path) for path in vm.sockets if "serial" in path))
    try:
        console.send("a")
        return console.wait("AUDIT")
    finally:
        console.close()


def assert_goes_on(vm: RestoredVm, after: int) -> int:
    """It books on from the instant, and no sum is torn; returns how far it is."""
    first = audit(vm)
    assert first.startswith("AUDIT ok"), first
    assert transfers(first) >= after, "it started anew"
    while transfers(again := audit(vm)) == transfers(first):
        pass
    assert again.startswith("AUDIT ok"), again
    return transfers(again)


def test_clones_of_a_running_board_go_on_each_by_itself(
    board: BoardProcess, places: Path, state: Path
) -> None:
    before = transfers(board.audit())
    vms = api.fork(board.pid, 2)
    assert [vm.name for vm in vms] == [f"{board.name}-1", f"{board.name}-2"]
    assert not {*vms[0].sockets, vms[0].directory, vms[0].disk_directory} & {
        *vms[1].sockets, vms[1].directory, vms[1].disk_directory,
    }  # fmt: skip
    for vm in vms:
        assert str(board.serial) not in vm.argv
        assert all(Path(path).is_socket() for path in vm.sockets)
        assert_goes_on(vm, before)
    assert board.audit().startswith("AUDIT ok")
    assert transfers(board.audit()) > before

    parent = f"{board.name} (pid {board.pid})"
    seen: dict[int, dict[str, Any]] = {}

    def all_answered() -> bool:
        seen.update((vm["pid"], vm) for vm in json.loads(run("ps", "--json").stdout))
        return all(seen[pid]["status"] for pid in (board.pid, *(vm.pid for vm in vms)))

    wait_until(all_answered)
    assert seen[board.pid]["restored_from"] is None
    for vm in vms:
        assert (seen[vm.pid]["vmm"], seen[vm.pid]["status"]) == ("board", "running")
        assert seen[vm.pid]["restored_from"] == parent
    lines = run("ps").stdout.decode().splitlines()
    assert sum(f" {parent} " in line for line in lines) == 2

    done = run("kill", *(vm.name for vm in vms))
    assert done.returncode == 0, done.stderr
    assert not any(vm.is_running for vm in vms)
    assert not list(places.iterdir())
    assert not list(state.iterdir())
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*"))
    assert board.audit().startswith("AUDIT ok")


def test_neither_the_end_of_the_board_nor_of_a_clone_disturbs_the_other_clone(
    board: BoardProcess, state: Path
) -> None:
    first, second = api.fork(board.pid, 2)
    reached = assert_goes_on(second, 0)
    first.kill()
    reached = assert_goes_on(second, reached)
    end(board.pid)
    assert_goes_on(second, reached)


def test_a_clone_of_a_clone_names_its_own_parent(board: BoardProcess, state: Path) -> None:
    (clone,) = api.fork(board.pid, name="child")
    reached = assert_goes_on(clone, 0)
    (grandchild,) = api.fork("child", name="grandchild")
    clone.kill()
    assert_goes_on(grandchild, reached)
    assert grandchild.parent == f"child (pid {clone.pid})"


def test_a_kept_snapshot_is_what_clones_of_a_board_are_from(
    board: BoardProcess, tmp_path: Path, state: Path
) -> None:
    file = tmp_path / "kept.still"
    done = run("fork", board.name, "-n", "2", "--name", "k{n}", "--keep", file, "--json")
    assert done.returncode == 0, done.stderr
    assert [vm["name"] for vm in json.loads(done.stdout)] == ["k1", "k2"]
    assert {vm.snapshot for vm in list_restored()} == {str(file)}
    assert api.verify(file).frames
    for vm in list_restored():
        assert_goes_on(vm, 0)


def test_a_clone_of_a_board_that_does_not_start_takes_the_others_along(
    board: BoardProcess, places: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_stream, begun = Restoring._by_stream, list[Started]()

    def fail_the_second(work: Restoring, number: int, on_progress: Progress | None) -> Started:
        if number:
            raise MachineError("no more", guest_state="none")
        begun.append(by_stream(work, number, on_progress))
        return begun[0]

    monkeypatch.setattr(Restoring, "_by_stream", fail_the_second)
    with pytest.raises(MachineError, match="no more"):
        api.fork(board.pid, 2)
    assert begun[0].state == "running"
    assert not Path(f"/proc/{begun[0].pid}").exists()
    assert not list(places.iterdir())
    assert not list(state.iterdir())
    assert not list(FORKS.glob(f"{FORK_PREFIX}{os.getpid()}-*"))
    assert board.audit().startswith("AUDIT ok")
