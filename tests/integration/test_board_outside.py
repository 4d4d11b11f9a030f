"""A board of another process as a machine: found, described, watched, and refused where it must."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from stillframe.board.board_command import parse_options
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration.host import start_host
from stillframe.board.nameplate import Nameplate, PublishedNameplate, read_nameplates
from stillframe.board.process_board import ProcessBoard
from stillframe.errors import (
    NotFoundError,
    RefusedError,
    StillframeError,
    UsageError,
)
from stillframe.machine.finding import connect, find_vm, list_vms
from stillframe.machine.process.machine import ProcessMachine
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.still.frames import LEVEL_NONE
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.board_process import BoardProcess, ledger
from tests.support.ledger_check import check_ledger
from tests.support.probes import has_uffd_wp
from tests.support.tiny_guest import IDLE, write_guest
from tests.support.waiting import wait_until

RAM = 24 << 20
TAKE_S = 120.0


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardProcess]:
    directory = tmp_path_factory.mktemp("board")
    with ledger("--ram", RAM, "--cpus", 2, directory=directory) as board:
        yield board


def test_it_is_found_by_name_pid_and_socket(board: BoardProcess) -> None:
    for ref in (board.name, str(board.pid), str(board.qmp), f"unix:{board.qmp}"):
        with connect(ref) as machine:
            assert isinstance(machine, ProcessBoard)
            assert machine.pid == board.pid
            assert machine.process_alive()
            assert machine.status() == "running"
    found = find_vm(board.name)
    assert parse_options(found.argv[3:]).board.serial == f"unix:{board.serial}"


def test_several_clients_at_once(board: BoardProcess) -> None:
    with connect(board.name) as one, connect(board.name) as two:
        assert one.status() == two.status() == "running"


def test_what_it_is(board: BoardProcess) -> None:
    with connect(board.name) as machine:
        record = machine.describe()
        assert (record.vmm, record.machine_type) == ("board", "stillframe-board-1")
        assert (record.name, record.vcpus, record.cwd) == (board.name, 2, "/")
        assert machine.preflight() == machine.preflight("stop") == []
        assert machine.preflight(moment="stop") == machine.preflight(moment="saved") == []
        machine.check_right()
        blocks = machine.ram_blocks()
        assert [block.idstr for block in blocks] == ["board.ram", "board.vram"]
        assert all(block.shared and block.backing == "memfd" for block in blocks)
        assert machine.blocks_signature() == machine.blocks_signature()
        assert {part.idstr: part.gpa for part in machine.memory_map(blocks)} == {
            "board.ram": 0,
            "board.vram": 0xE0000000,
        }


def test_its_blocks_are_where_it_says(board: BoardProcess, tmp_path: Path) -> None:
    with connect(board.name) as machine:
        machine.stop()
        try:
            machine.qmp.execute(
                "pmemsave", {"val": 0, "size": RAM, "filename": str(tmp_path / "ram")}
            )
            block = machine.ram_blocks()[0]
            with Path(f"/proc/{board.pid}/mem").open("rb") as memory:
                memory.seek(block.hva)
                content = memory.read(block.used_length_bytes)
        finally:
            machine.cont()
        assert content == (tmp_path / "ram").read_bytes()


def test_device_state(board: BoardProcess) -> None:
    with connect(board.name) as machine:
        machine.prepare_device_state()
        machine.stop()
        one, two = machine.save_device_state(), machine.save_device_state()
        machine.cont()
        assert one == two
        assert one[:4] == b"QEVM"


def test_events_are_watched(board: BoardProcess) -> None:
    with connect(board.name) as machine, connect(board.name) as other:
        watch = machine.watch()
        other.stop()
        other.cont()
        wait_until(lambda: [event.name for event in watch.seen()] == ["STOP", "RESUME"])
        watch.close()


def test_never_torn(board: BoardProcess, tmp_path: Path) -> None:
    has_uffd_wp().require()
    for number in range(5):
        time.sleep(0.03 * number)
        with connect(board.name) as machine:
            take_job(machine, tmp_path / f"{number}.still").wait(TAKE_S)
        with open_snapshot(tmp_path / f"{number}.still") as snapshot:
            ram = b"".join(snapshot.read_page("board.ram", page) for page in range(RAM >> 12))
        report = check_ledger(ram)
        assert report.consistent, str(report)
    assert board.audit().startswith("AUDIT ok")


def take_job(machine: ProcessMachine, path: Path, rate: int | None = None) -> SnapshotJob:
    """A snapshot that has begun; ``rate``: bytes per second, uncompressed."""
    options = SnapshotOptions()
    if rate is not None:
        options = SnapshotOptions(compression_level=LEVEL_NONE, max_bandwidth_bytes_per_s=rate)
    sink = LocalSink(path)
    return SnapshotJob(lambda control: take_snapshot(control, machine, sink, options))


def test_not_during_a_migration(board: BoardProcess, tmp_path: Path) -> None:
    with connect(board.name) as machine:
        machine.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        machine.qmp.execute("migrate", {"uri": f"file:{tmp_path}/stream"})
        try:
            names = [blocker.name for blocker in machine.preflight()]
            assert names[0] == "migration-running"  # it tracks writes itself, too
            [blocker] = machine.preflight(moment="stop")
            assert (blocker.name, blocker.severity) == ("migration-running", "busy")
        finally:
            machine.qmp.execute("migrate_cancel")
            wait_until(lambda: machine.preflight() == [])
        machine.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 27})
    assert board.audit().startswith("AUDIT ok")


def test_ram_that_is_plugged_in_meanwhile(tmp_path: Path) -> None:
    has_uffd_wp().require()
    with (
        ledger("--ram", "16M") as board,
        connect(board.name) as machine,
        connect(board.name) as other,
    ):
        job = take_job(machine, tmp_path / "a.still", 4 << 20)
        wait_until(lambda: job.stats.phase == "saving")
        backend = {"qom-type": "memory-backend-ram", "id": "m0", "size": 8 << 20}
        other.qmp.execute("object-add", backend)
        other.qmp.execute("device_add", {"driver": "pc-dimm", "id": "d0", "memdev": "m0"})
        # It came after the instant, so it is no part of the snapshot.
        assert any("appeared after the instant" in note for note in job.wait(TAKE_S).notes)
        assert [block.idstr for block in machine.ram_blocks()][2:] == ["board.dimm0"]
        assert board.audit().startswith("AUDIT ok")
        taken = take_job(machine, tmp_path / "b.still").wait(TAKE_S)
        with open_snapshot(taken.file) as snapshot:
            places = [part.gpa for part in snapshot.manifest.memory_map]
            assert places == [0, 0xE0000000, 1 << 32]


# Boards in programs of others


def test_two_boards_in_one_program(tmp_path: Path) -> None:
    guest = write_guest(tmp_path / "g.elf", IDLE)
    with ExitStack() as stack:
        for name in ("one", "two"):
            config = BoardConfig(name=f"{name}-{os.getpid()}", guest_path=guest, ram_bytes=8 << 20)
            stack.enter_context(start_host(config, qmp=str(tmp_path / name)))
        ours = {vm.name: vm for vm in list_vms() if vm.pid == os.getpid()}
        assert len(ours) == 2
        with pytest.raises(UsageError, match="2 boards"):
            find_vm(str(os.getpid()))
        for name, vm in ours.items():
            with connect(name) as machine:
                assert machine.qmp.execute("query-name") == {"name": name}
                assert machine.info == vm
                for attach in (machine.check_right, machine.open_write_protection):
                    with pytest.raises(RefusedError, match="cannot attach to itself") as caught:
                        attach()
                    assert "'migrate'" in (caught.value.remedy or "")
            assert parse_options(vm.argv[3:]).board.guest == guest
    assert read_nameplates(Path("/proc/self")) == []


def test_a_nameplate_that_lies(board: BoardProcess) -> None:
    """It cannot give another VM's monitor for its own."""
    plate = Nameplate(
        pid=os.getpid(),
        name=f"liar-{os.getpid()}",
        command=("stillframe", "board", "run", "ledger"),
        ram_bytes=RAM,
        qmp=str(board.qmp),
    )
    hung = PublishedNameplate(plate)
    try:
        with pytest.raises(NotFoundError, match=f"is process {board.pid}'s"):
            connect(plate.name)
        with connect(str(board.qmp)) as machine:
            assert machine.info.name == board.name
    finally:
        hung.close()
    gone = PublishedNameplate(msgspec.structs.replace(plate, qmp="/nonexistent/qmp"))
    try:
        with pytest.raises(NotFoundError):
            connect(plate.name)
    finally:
        gone.close()


def test_it_ends_while_it_is_saved(tmp_path: Path) -> None:
    has_uffd_wp().require()
    with ledger("--ram", "16M") as board, connect(board.name) as machine:
        job = take_job(machine, tmp_path / "a.still", 4 << 20)
        wait_until(lambda: job.stats.phase == "saving")
        threading.Timer(0.05, board.process.kill).start()
        with pytest.raises(StillframeError) as caught:
            job.wait(TAKE_S)
        assert caught.value.guest_state == "none"
    assert list(tmp_path.iterdir()) == []
