"""Migration of a toy board to another one: completed, cancelled, failed; nothing is lost."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from stillframe.board.migration import live, unconfirmed
from stillframe.board.migration.engine import Migration
from stillframe.board.migration.ram_loader import RamLoader
from stillframe.board.migration.return_path import ReturnPathWriter
from stillframe.board.monitor.descriptors import Descriptors
from stillframe.errors import (
    BusyError,
    HostError,
    RefusedError,
    SinkError,
    StillframeError,
    UsageError,
)
from stillframe.snapshot.job_state import StateMachine
from stillframe.vmstate.records import Pages
from tests.support.waiting import wait_until
from tests.unit.board.migration.toy_board import PAGE, ToyBoard

PROTECTIONS = ["userfaultfd", "mprotect"]


class Machines:
    """Toy boards with their migrations; all closed after the test."""

    def __init__(self, stack: ExitStack, prefer: str) -> None:
        self._stack = stack
        self._prefer = prefer

    def _migration(self, board: ToyBoard) -> Migration:
        self._stack.callback(board.close)
        migration = Migration(board, protection_prefer=self._prefer)  # type: ignore[arg-type]
        self._stack.callback(migration.close)
        return migration

    def source(self, **options: int) -> tuple[ToyBoard, Migration]:
        board = ToyBoard(**options)
        migration = self._migration(board)
        board.power_on()
        return board, migration

    def destination(self, **options: int) -> tuple[ToyBoard, Migration]:
        board = ToyBoard(**options)
        board.start_incoming()
        return board, self._migration(board)


@pytest.fixture(params=PROTECTIONS)
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    with ExitStack() as stack:
        yield Machines(stack, request.param)


def test_to_another_board(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    other, destination = machines.destination()
    events: list[str] = []
    source.add_listener(lambda event, data: events.append(f"{event} {[*data.values()][-1]}"))
    source.set_capabilities({"events": True})
    destination.incoming(f"unix:{tmp_path}/s")
    assert destination.query()["socket-address"] == [{"type": "unix", "path": f"{tmp_path}/s"}]
    assert board.is_progressing()
    source.migrate(f"unix:{tmp_path}/s")
    assert source.wait(60)
    assert destination.wait(60)
    assert board.run_state == "postmigrate"
    assert not board.disks_active
    assert other.run_state == "running"
    assert other.disks_active
    assert other.is_progressing()
    other.stop()
    assert other.consistent()
    assert other.number >= board.number > 0
    info = source.query()
    assert info["status"] == "completed"
    ram = info["ram"]
    assert isinstance(ram, dict)
    assert ram["total"] == 4 << 20 | 16 * PAGE
    assert ram["remaining"] == 0
    assert ram["duplicate"] + ram["normal"] >= ram["total"] // PAGE
    assert ram["dirty-sync-count"] >= 2
    assert ram["transferred"] == sum(
        ram[f"{stage}-bytes"] for stage in ("precopy", "downtime", "postcopy")
    )
    passes = [event for event in events if event.startswith("MIGRATION_PASS")]
    assert passes[:2] == ["MIGRATION_PASS 1", "MIGRATION_PASS 2"]
    assert [event for event in events if event not in passes] == [
        "MIGRATION setup",
        "MIGRATION active",
        "MIGRATION device",
        "MIGRATION completed",
    ]
    assert destination.query()["status"] == "completed"
    with pytest.raises(RefusedError) as caught:
        source.migrate(f"unix:{tmp_path}/s")
    assert "previous migration" in str(caught.value)
    with pytest.raises(RefusedError):
        destination.incoming(f"unix:{tmp_path}/s")


def test_a_slow_destination_gets_most_of_it_before_the_stop(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits into buffers on the way is no measure of how fast it loads."""
    board, source = machines.source(ram_bytes=24 << 20, pages_per_s=500)
    other, destination = machines.destination(ram_bytes=24 << 20)
    board.rams[0].write(0, os.urandom(24 << 20))
    fill = RamLoader._fill

    def fill_slowly(loader: RamLoader, run: Pages) -> None:
        time.sleep(len(run.data) / (8 << 20))
        fill(loader, run)

    monkeypatch.setattr(RamLoader, "_fill", fill_slowly)
    # 12 MiB of it; on a busy host it may be much less until it is gone over to.
    source.parameters.set({"max-bandwidth": 0, "downtime-limit": 1500})
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    assert source.wait(60)
    info = source.query()
    assert int(str(info["downtime"])) < source.parameters.now.downtime_limit
    ram = info["ram"]
    assert isinstance(ram, dict)
    assert ram["downtime-bytes"] < 8 << 20 < ram["precopy-bytes"]
    assert destination.wait(60)
    assert other.is_progressing()


def test_the_downtime_is_told_in_parts(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    board.on_save = lambda: time.sleep(0.02)
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)
    info = source.query()
    own = info["x-stillframe"]
    assert isinstance(own, dict)
    parts = own["downtime"]
    assert parts["devices_ms"] >= 20
    assert parts["stop_ms"] > 0
    assert parts["cont_ms"] > 0
    assert own["downtime_ms"] == pytest.approx(sum(parts.values()))
    assert info["downtime"] == round(own["downtime_ms"])


def test_the_expected_downtime_follows_what_the_guest_writes(
    machines: Machines, tmp_path: Path
) -> None:
    _, source = machines.source(pages_per_s=20000)
    source.parameters.set({"max-bandwidth": 16 << 20, "downtime-limit": 0})
    source.migrate(f"file:{tmp_path}/a")
    wait_until(lambda: int(str(source.query().get("expected-downtime", 0))) > 0)


def test_the_guest_is_stopped_before_the_devices_turn_is_told(
    machines: Machines, tmp_path: Path
) -> None:
    """QEMU's order (``migration/migration.c``: migration_completion_precopy)."""
    board, source = machines.source()
    states: list[str] = []
    source.add_listener(
        lambda _, data: states.append(board.run_state) if data.get("status") == "device" else None
    )
    source.set_capabilities({"events": True})
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)
    assert states == ["finish-migrate"]


def test_a_paused_guest_stays_paused(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    other, destination = machines.destination()
    board.stop()
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    assert source.wait(60)
    assert destination.wait(60)
    assert other.run_state == "paused"
    assert other.consistent()


def test_into_a_file_and_out_of_it(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    other, destination = machines.destination()
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)
    assert board.run_state == "postmigrate"
    destination.incoming(f"file:{tmp_path}/a")
    assert destination.wait(60)
    other.stop()
    assert other.consistent()


def test_a_device_that_writes_ram_while_it_is_saved(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    other, destination = machines.destination()
    board.on_save = lambda: board.rams[1].write(3 * PAGE + 5, b"written while stopped")
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)
    destination.incoming(f"file:{tmp_path}/a")
    assert destination.wait(60)
    assert other.rams[1].read(3 * PAGE + 5, 21) == b"written while stopped"
    statistics = source.query()["x-stillframe"]
    assert isinstance(statistics, dict)
    (write,) = statistics["writes_while_stopped"]
    assert write["idstr"] == "board.vram"
    assert write["offset_bytes"] <= 3 * PAGE < write["offset_bytes"] + write["length_bytes"]


@pytest.mark.parametrize("seed", range(8))
def test_cancelled_at_a_random_moment(machines: Machines, tmp_path: Path, seed: int) -> None:
    board, source = machines.source()
    other, destination = machines.destination()
    source.parameters.set({"max-bandwidth": 8 << 20})
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    time.sleep(Random(seed).random() * 0.6)
    source.cancel()
    assert source.wait(60)
    if source.query()["status"] == "completed":
        assert other.is_progressing()
        return
    assert source.query()["status"] == "cancelled"
    assert board.run_state == "running"
    assert board.disks_active
    assert board.is_progressing()
    with pytest.raises(StillframeError):
        destination.wait(60)
    assert other.run_state == "inmigrate"
    assert destination.query()["status"] == "failed"
    assert destination.query()["error-desc"]
    # Nothing is left of it.
    source.parameters.set({"max-bandwidth": 0})
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)


def test_a_destination_that_vanishes(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    _, destination = machines.destination()
    source.parameters.set({"max-bandwidth": 4 << 20, "downtime-limit": 0})
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    wait_until(lambda: destination.query().get("status") == "active")
    time.sleep(0.1)
    destination.close()
    with pytest.raises(SinkError) as caught:
        source.wait(60)
    info = source.query()
    assert info["status"] == "failed"
    assert info["error-desc"]
    assert "ram" not in info
    assert caught.value.guest_state == "running"
    assert board.run_state == "running"
    assert board.is_progressing()


def test_a_destination_of_another_machine(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    other, destination = machines.destination(ram_bytes=8 << 20)
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError):
        source.wait(60)
    with pytest.raises(StillframeError) as caught:
        destination.wait(60)
    assert "Size mismatch" in str(caught.value)
    assert board.is_progressing()
    assert other.run_state == "inmigrate"


def test_nobody_is_there(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    source.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError):
        source.wait(60)
    assert source.query()["error-desc"] == (
        f"Failed to connect to '{tmp_path}/s': No such file or directory"
    )
    assert board.run_state == "running"
    assert board.history == ["running"], "it was never stopped"


def test_a_destination_that_only_stores(machines: Machines, tmp_path: Path) -> None:
    """As from QEMU, it gets the whole stream; only a capability demands an answer."""
    board, source = machines.source()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{tmp_path}/s")
    server.listen()
    received = bytearray()

    def store() -> None:
        connection, _ = server.accept()
        with connection:
            while part := connection.recv(1 << 20):
                received.extend(part)

    source.set_capabilities({"return-path": True})
    for demanded in (True, False):
        thread = threading.Thread(target=store)
        thread.start()
        source.migrate(f"unix:{tmp_path}/s")
        if demanded:
            with pytest.raises(SinkError) as caught:
                source.wait(60)
            assert "does not answer" in str(caught.value)
            assert board.history == ["running"], "it was not stopped for that"
            source.set_capabilities({"return-path": False})
        else:
            assert source.wait(60)
        thread.join()
        if demanded:
            received.clear()
    server.close()
    (tmp_path / "a").write_bytes(received)
    other, destination = machines.destination()
    destination.incoming(f"file:{tmp_path}/a")
    assert destination.wait(60)
    other.stop()
    assert other.consistent()


def test_refusals(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    with pytest.raises(UsageError):
        source.migrate("bla:x")
    assert source.query() == {}
    with pytest.raises(StillframeError):
        source.migrate("fd:nope")
    assert source.query()["status"] == "failed"
    with pytest.raises(RefusedError) as caught:
        source.incoming(f"unix:{tmp_path}/s")
    assert str(caught.value) == "'-incoming' was not specified on the command line"
    with pytest.raises(RefusedError):
        source.start_postcopy()
    board.blockers.append("a device cannot be migrated")
    assert source.query()["blocked-reasons"] == ["a device cannot be migrated"]
    with pytest.raises(RefusedError) as caught:
        source.migrate(f"file:{tmp_path}/a")
    assert str(caught.value) == "a device cannot be migrated"
    board.blockers.clear()
    source.cancel()
    source.parameters.set({"max-bandwidth": 1 << 20, "downtime-limit": 0})
    source.migrate(f"file:{tmp_path}/a")
    with pytest.raises(BusyError) as busy:
        source.migrate(f"file:{tmp_path}/b")
    assert str(busy.value) == "There's a migration process in progress"
    with pytest.raises(BusyError):
        source.set_capabilities({"events": True})
    source.cancel()
    assert source.wait(60)
    assert os.listdir(tmp_path) == []
    _, destination = machines.destination()
    with pytest.raises(RefusedError) as caught:
        destination.migrate(f"file:{tmp_path}/a")
    assert str(caught.value) == "Guest is waiting for an incoming migration"
    descriptors = len(os.listdir("/proc/self/fd"))
    for uri in ("bla:x", "fd:nope", f"file:{tmp_path}/nope"):
        with pytest.raises(StillframeError):
            destination.incoming(uri)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_switched_over_to_postcopy(tmp_path: Path) -> None:
    with ExitStack() as stack:
        machines = Machines(stack, "auto")
        board, source = machines.source(pages_per_s=20000)
        other, destination = machines.destination()
        for migration in (source, destination):
            migration.set_capabilities({"postcopy-ram": True, "events": True})
        events: list[object] = []
        source.add_listener(lambda event, data: events.append(data.get("status")))
        arrivals: list[object] = []
        destination.add_listener(lambda event, data: arrivals.append(data.get("status")))
        # So slow that it never converges, and that most of RAM is still to come.
        source.parameters.set({"max-bandwidth": 1 << 20, "downtime-limit": 0})
        source.parameters.set({"max-postcopy-bandwidth": 1 << 20})
        destination.incoming(f"unix:{tmp_path}/s")
        source.migrate(f"unix:{tmp_path}/s")
        wait_until(lambda: source.query().get("status") == "active")
        time.sleep(0.2)
        source.start_postcopy()
        wait_until(lambda: source.query()["status"] == "postcopy-active")
        with pytest.raises(RefusedError):
            source.cancel()
        assert other.is_progressing(), "while its RAM still comes"
        source.parameters.set({"max-postcopy-bandwidth": 0})
        assert source.wait(60)
        assert destination.wait(60)
        assert other.is_progressing()
        other.stop()
        assert other.consistent()
        assert board.run_state == "postmigrate"
        assert not board.disks_active
        ram = source.query()["ram"]
        assert isinstance(ram, dict)
        assert ram["postcopy-requests"] > 0
        assert ram["postcopy-bytes"] > 0
        assert [state for state in events if state] == [
            "setup",
            "active",
            "device",
            "postcopy-active",
            "completed",
        ]
        assert arrivals == ["setup", "active", "postcopy-active", "completed"]


def test_postcopy_of_pages_that_never_held_anything(tmp_path: Path) -> None:
    """They come as zeroes in precopy, and are holes at the destination: nobody may ask for them,
    since the source does not send them again."""
    with ExitStack() as stack:
        machines = Machines(stack, "auto")
        board = ToyBoard()
        stack.callback(board.close)
        source = Migration(board)  # type: ignore[arg-type]
        stack.callback(source.close)
        board.rams[0].write(1 << 20, os.urandom(3 << 20))
        other, destination = machines.destination()
        for migration in (source, destination):
            migration.set_capabilities({"postcopy-ram": True})
        source.parameters.set({"max-bandwidth": 1 << 19, "downtime-limit": 0})
        source.parameters.set({"max-postcopy-bandwidth": 1 << 18})
        destination.incoming(f"unix:{tmp_path}/s")
        source.migrate(f"unix:{tmp_path}/s")
        wait_until(lambda: transferred(source) > 1 << 18)
        source.start_postcopy()
        wait_until(lambda: destination.query()["status"] == "postcopy-active")
        assert other.rams[0].read(9 * PAGE, PAGE) == bytes(PAGE)
        asked = (3 << 20) + 100 * PAGE
        assert other.rams[0].read(asked, PAGE) == board.rams[0].read(asked, PAGE)
        assert destination.query()["status"] == "postcopy-active", "that waited for everything"
        source.parameters.set({"max-postcopy-bandwidth": 0})
        assert source.wait(60)
        assert destination.wait(60)
        size = board.rams[0].length_bytes
        assert other.rams[0].read(0, size) == board.rams[0].read(0, size)


def transferred(migration: Migration) -> int:
    ram = migration.query().get("ram", {})
    assert isinstance(ram, dict)
    return int(ram.get("transferred", 0))


def test_postcopy_is_refused_with_mprotect(tmp_path: Path) -> None:
    with ExitStack() as stack:
        machines = Machines(stack, "mprotect")
        _, destination = machines.destination()
        with pytest.raises(RefusedError) as caught:
            destination.set_capabilities({"postcopy-ram": True})
        assert str(caught.value).startswith("Postcopy is not supported: ")
        assert "mprotect" in str(caught.value)
        # A source tracks writes with it all the same.
        _, source = machines.source()
        source.set_capabilities({"postcopy-ram": True})


def test_a_destination_without_the_capability(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    _, destination = machines.destination()
    source.set_capabilities({"postcopy-ram": True})
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError):
        source.wait(60)
    with pytest.raises(StillframeError) as caught:
        destination.wait(60)
    assert "RAM postcopy is disabled but have 16 byte advise" in str(caught.value)
    # It listened from its start, so there was no moment to set one.
    assert "--incoming defer" in str(caught.value.remedy)
    assert "migrate-incoming" in str(caught.value.remedy)
    assert board.is_progressing()


def test_no_way_back(machines: Machines, tmp_path: Path) -> None:
    board, source = machines.source()
    source.set_capabilities({"return-path": True})
    source.migrate(f"file:{tmp_path}/a")
    with pytest.raises(StillframeError) as caught:
        source.wait(60)
    assert str(caught.value) == "Unable to open return-path for postcopy"
    assert os.listdir(tmp_path) == []
    assert board.is_progressing()


def test_it_ends_with_its_machine(machines: Machines, tmp_path: Path) -> None:
    _, destination = machines.destination()
    destination.incoming(f"unix:{tmp_path}/s")
    began = threading.active_count()
    destination.close()
    assert threading.active_count() < began
    assert not (tmp_path / "s").exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_ANSWER_S", 0.1)
    monkeypatch.setattr(unconfirmed, "PATIENCE_S", 0.3)


def test_a_destination_that_never_accepts(
    machines: Machines, tmp_path: Path, impatient: None
) -> None:
    """The kernel takes all of it; nobody reads it."""
    board, source = machines.source(ram_bytes=16 * PAGE)
    board.stop()  # else what it writes does not fit into the kernel for long
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{tmp_path}/s")
    server.listen()
    with server:
        source.migrate(f"unix:{tmp_path}/s")
        with pytest.raises(SinkError) as caught:
            source.wait(60)
        assert "neither answers nor reads" in str(caught.value)
        assert caught.value.guest_state == "paused"
        assert board.history == ["running", "paused"], "it was not stopped for that"
        board.cont()
        assert board.is_progressing()


def test_nobody_says_whether_a_distant_destination_reads(
    machines: Machines, impatient: None
) -> None:
    """All of it is in a kernel over there: whoever accepts it later may start the guest."""
    board, source = machines.source(ram_bytes=1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        source.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(SinkError) as caught:
            source.wait(60)
    if caught.value.guest_state == "running":
        pytest.skip("missing room for all of it in the kernel")
    assert "may run at the destination" in str(caught.value)
    assert board.run_state == "postmigrate"
    assert source.query()["status"] == "failed"
    board.cont()
    assert board.is_progressing()


@pytest.mark.parametrize("reads_all", [True, False])
def test_a_distant_destination_that_only_stores(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, reads_all: bool
) -> None:
    monkeypatch.setattr(live, "_ANSWER_S", 0.1)
    monkeypatch.setattr(unconfirmed, "PATIENCE_S", 60.0)  # it reads, when it has the time
    board, source = machines.source(ram_bytes=1 << 20)
    # Else it could read the end together with what it stops at.
    at_once = 1 << 16 if reads_all else 64

    def store() -> None:
        connection, _ = server.accept()
        with connection:
            tail = b""
            while part := connection.recv(at_once):
                tail = (tail + part)[-1000:]
                if not reads_all and b"globalstate" in tail:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=store)
        thread.start()
        source.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        if reads_all:
            assert source.wait(60)
            assert board.run_state == "postmigrate"
        else:
            with pytest.raises(SinkError):
                source.wait(60)
        thread.join()


def test_the_destinations_word_is_lost(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest runs there, and the source cannot know: it must not run in two places."""
    board, source = machines.source()
    other, destination = machines.destination()

    def lose(self: ReturnPathWriter, error: int) -> None:
        raise SinkError("the connection broke")

    monkeypatch.setattr(ReturnPathWriter, "shut", lose)
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError) as caught:
        source.wait(60)
    assert "may run at the destination" in str(caught.value)
    assert caught.value.guest_state == "paused"
    assert destination.wait(60)
    assert other.is_progressing()
    assert board.run_state == "postmigrate"
    assert not board.disks_active
    assert source.query()["status"] == "failed"


def test_the_destination_cannot_start_the_guest(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, after the point of no return: then the guest goes on here."""
    board, source = machines.source()
    other, destination = machines.destination()

    def refuse() -> None:
        raise HostError("the disk cannot be opened")

    monkeypatch.setattr(other, "finish_incoming", refuse)
    destination.incoming(f"unix:{tmp_path}/s")
    source.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError) as caught:
        source.wait(60)
    assert "Sibling indicated error 1" in str(caught.value)
    assert board.is_progressing()
    assert board.disks_active
    with pytest.raises(HostError):
        destination.wait(60)


def test_cancelled_while_it_fails(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at its state and the last change of it."""
    _, source = machines.source()
    value = StateMachine.value.fget
    assert value is not None

    def look(self: StateMachine) -> str:
        seen: str = value(self)
        if threading.current_thread().name == "stillframe-migration" and seen == "setup":
            canceller = threading.Thread(target=source.cancel)
            canceller.start()
            canceller.join()
        return seen

    monkeypatch.setattr(StateMachine, "value", property(look))
    source.migrate(f"unix:{tmp_path}/nobody")
    with pytest.raises(SinkError):
        source.wait(60)
    assert source.query()["status"] in ("failed", "cancelled")
    source.migrate(f"file:{tmp_path}/a")
    assert source.wait(60)


class OneFile(Descriptors):
    """Descriptors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[int] = []

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        self.opened.append(os.open(self.path, flags | os.O_CREAT))
        return self.opened[-1]


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_an_offset_that_no_file_has(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not stand in the way of the next one."""
    _, source = machines.source()
    fds = OneFile(tmp_path / "a")
    with pytest.raises(SinkError):
        source.migrate(f"file:/dev/fdset/1,offset={(1 << 63) - 1}", fds=fds)
    assert source.query()["status"] == "failed"
    assert not is_open(fds.opened[0])
    # Nor does a bug.
    monkeypatch.setattr(os, "ftruncate", None)
    with pytest.raises(TypeError):
        source.migrate("file:/dev/fdset/1", fds=fds)
    monkeypatch.undo()
    assert source.query()["status"] == "failed"
    source.migrate("file:/dev/fdset/1,offset=8", fds=fds)
    assert source.wait(60)


def test_a_source_that_cannot_be_sought(machines: Machines) -> None:
    _, destination = machines.destination()
    reader, writer = os.pipe()
    fds = OneFile(Path(f"/proc/self/fd/{reader}"))
    with pytest.raises(HostError) as caught:
        destination.incoming("file:/dev/fdset/1,offset=8", fds=fds)
    assert "from offset 8 on" in str(caught.value)
    assert not is_open(fds.opened[0])
    os.close(reader)
    os.close(writer)


def test_under_way_while_it_is_loaded(machines: Machines, tmp_path: Path) -> None:
    """Then no RAM may be added; while nothing comes yet it may."""
    _, source = machines.source()
    _, destination = machines.destination()
    assert not destination.under_way
    destination.incoming(f"unix:{tmp_path}/s")
    assert not destination.under_way
    source.parameters.set({"max-bandwidth": 4 << 20, "downtime-limit": 0})
    source.migrate(f"unix:{tmp_path}/s")
    wait_until(lambda: destination.query().get("status") == "active")
    assert destination.under_way
    source.cancel()
    with pytest.raises(StillframeError):
        destination.wait(60)
    assert not destination.under_way
