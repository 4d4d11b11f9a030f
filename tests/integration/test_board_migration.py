"""Real boards migrate: the ledger's audit says whether all of RAM is of one instant.

Every test has the ledger at work on two vCPUs, with devices that write into its RAM.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stillframe.board.hardware.block import BUSY
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration import background
from stillframe.board.migration.host import start_host
from stillframe.board.migration.live import LiveTransfer
from stillframe.board.migration.return_path import PageRequest
from stillframe.board.migration.tracked_ram import TrackedRam
from stillframe.board.state.fields import StateDescription, u64
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import (
    BusyError,
    DataError,
    RefusedError,
    SinkError,
    SnapshotFailed,
    StillframeError,
)
from stillframe.snapshot.options import SnapshotOptions
from stillframe.still.import_stream import import_stream
from stillframe.store.backends.local import LocalSink
from tests.support.analyze_reader import Analysis
from tests.support.ledger_check import check_ledger
from tests.support.ledger_host import LedgerHost, LedgerHosts
from tests.support.raw_qmp import RawQmp
from tests.support.stream_summary import verify_stream
from tests.support.waiting import wait_until
from tests.unit.board.tiny import RESULTS, compile_guest

PROTECTIONS = ("userfaultfd", "mprotect")
PAGE = 4096

Factory = Callable[..., LedgerHosts]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Factory]:
    with ExitStack() as stack:
        yield lambda **options: LedgerHosts(stack, tmp_path, **options)


def assert_at_work(ledger: LedgerHost) -> None:
    """It runs, all of its RAM is of one instant, and it goes on."""
    assert ledger.board.run_state == "running"
    first = ledger.audit()
    assert first.startswith("AUDIT ok"), first
    before = ledger.transfers()
    wait_until(lambda: ledger.transfers() > before)


def never_done(ledger: LedgerHost, bytes_per_s: int = 24 << 20) -> None:
    """So slow, and with so short a downtime, that precopy never comes to an end."""
    ledger.migration.parameters.set({"max-bandwidth": bytes_per_s, "downtime-limit": 0})


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_live(hosts: Factory, tmp_path: Path, protection: str, kind: str) -> None:
    made = hosts(protection=protection, options="rate=20 dma=entropy")
    source = made.source()
    other = made.destination("tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s")
    (address,) = other.query()["socket-address"]
    # A write un-protects 64 KiB of what is protected by mprotect, so more is left to be sent.
    limit_ms = 300 if protection == "mprotect" else 30
    source.migration.parameters.set({"max-bandwidth": 0, "downtime-limit": limit_ms})
    uri = f"tcp:127.0.0.1:{address['port']}" if kind == "tcp" else f"unix:{tmp_path}/s"
    source.migration.migrate(uri)
    assert source.migration.wait(60)
    assert other.migration.wait(60)
    assert source.board.run_state == "postmigrate"
    # Nothing changed in the source after its instant.
    assert check_ledger(source.ram()).consistent
    assert_at_work(other)
    info = source.query()
    assert info["status"] == "completed"
    assert info["ram"]["dirty-sync-count"] >= 2
    assert info["ram"]["remaining"] == 0
    assert info["downtime"] > 0


def test_live_with_a_disk(hosts: Factory, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    made = hosts(options="rate=10 dma=all", disk=disk)
    source, other = made.source(), made.destination(f"unix:{tmp_path}/s")
    source.migration.parameters.set({"max-bandwidth": 0})
    source.migration.migrate(f"unix:{tmp_path}/s")
    assert source.migration.wait(60)
    assert_at_work(other)
    with pytest.raises(RefusedError):
        source.migration.migrate(f"unix:{tmp_path}/s")


def test_hot_plugged_ram_goes_along(hosts: Factory, tmp_path: Path) -> None:
    made = hosts()
    source, other = made.source(), made.destination(f"unix:{tmp_path}/s")
    source.board.plug_dimm(8 << 20)
    dimm = source.board.rams[-1]
    dimm.write(5 * PAGE, b"in the dimm")
    source.migration.parameters.set({"max-bandwidth": 0})
    source.migration.migrate(f"unix:{tmp_path}/s")
    assert source.migration.wait(60)
    assert_at_work(other)
    assert other.ram("board.dimm0")[5 * PAGE :][:11] == b"in the dimm"


@pytest.mark.parametrize("seed", range(6))
def test_cancelled_at_a_random_moment(hosts: Factory, tmp_path: Path, seed: int) -> None:
    made = hosts()
    source, other = made.source(), made.destination()
    other.migration.incoming(f"unix:{tmp_path}/s")
    source.migration.parameters.set({"max-bandwidth": 64 << 20})
    source.migration.migrate(f"unix:{tmp_path}/s")
    time.sleep(Random(seed).random() * 0.9)
    source.migration.cancel()
    assert source.migration.wait(60)
    if source.query()["status"] == "completed":
        assert_at_work(other)
        return
    assert source.query()["status"] == "cancelled"
    assert_at_work(source)
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    assert other.board.run_state == "inmigrate"
    other.board.cont()
    assert other.board.run_state == "inmigrate", "what is half loaded never runs"


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_the_destination_is_killed(hosts: Factory, tmp_path: Path, protection: str) -> None:
    made = hosts(protection=protection)
    source = made.source()
    never_done(source)
    process = made.destination_process(f"unix:{tmp_path}/s")
    source.migration.migrate(f"unix:{tmp_path}/s")
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > 8 << 20)
    process.kill()
    with pytest.raises(SinkError):
        source.migration.wait(60)
    assert source.query()["status"] == "failed"
    assert_at_work(source)


def test_the_destination_is_killed_at_the_last_moment(hosts: Factory, tmp_path: Path) -> None:
    """When the guest stands still already."""
    made = hosts()
    source = made.source()
    process = made.destination_process(f"unix:{tmp_path}/s")
    events: list[str] = []

    def kill_in_device(event: str, data: dict[str, object]) -> None:
        if event == "MIGRATION":
            events.append(str(data["status"]))
        if data.get("status") == "device":
            process.kill()

    source.migration.add_listener(kill_in_device)
    source.migration.set_capabilities({"events": True})
    source.migration.parameters.set({"max-bandwidth": 0})
    source.migration.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError):
        source.migration.wait(60)
    assert events[-2:] == ["device", "failed"]
    assert_at_work(source)


def start_postcopy(source: LedgerHost, other: LedgerHost, path: Path) -> None:
    """Switched over with most of RAM still to be sent."""
    for ledger in (source, other):
        ledger.migration.set_capabilities({"postcopy-ram": True})
    never_done(source)
    # Slow enough that a busy host looks at it before all has come.
    source.migration.parameters.set({"max-postcopy-bandwidth": 4 << 20})
    other.migration.incoming(f"unix:{path}")
    source.migration.migrate(f"unix:{path}")
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > 4 << 20)
    source.migration.start_postcopy()
    source.wait_status("postcopy-active", "completed", "failed")


def test_postcopy(hosts: Factory, tmp_path: Path) -> None:
    made = hosts(options="rate=0")
    source, other = made.source(), made.destination()
    start_postcopy(source, other, tmp_path / "s")
    with pytest.raises(RefusedError):
        source.migration.cancel()
    wait_until(lambda: other.board.run_state == "running")
    assert source.query()["status"] == "postcopy-active", "its RAM still comes"
    with pytest.raises(BusyError):
        other.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    assert other.migration.wait(60)
    assert source.board.run_state == "postmigrate"
    assert_at_work(other)
    ram = source.query()["ram"]
    assert ram["postcopy-requests"] > 0
    assert ram["postcopy-bytes"] > 0


def test_postcopy_loses_its_source(hosts: Factory, tmp_path: Path) -> None:
    """The guest is lost, and says so: it does not go on with RAM that never came."""
    made = hosts(options="rate=0")
    source, other = made.source(), made.destination()
    start_postcopy(source, other, tmp_path / "s")
    wait_until(lambda: other.board.run_state == "running")
    source.migration.close()
    with pytest.raises(StillframeError):
        source.migration.wait(60)
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    assert source.board.run_state == "postmigrate"
    assert other.board.run_state == "internal-error"
    assert other.query()["status"] == "failed"


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_background_snapshot(hosts: Factory, tmp_path: Path, protection: str) -> None:
    made = hosts(protection=protection, options="rate=40 dma=entropy")
    source = made.source()
    events: list[str] = []
    source.board.add_listener(lambda name, _: events.append(name))
    source.migration.add_listener(lambda name, data: events.append(str(data["status"])))
    source.migration.set_capabilities({"background-snapshot": True, "events": True})
    before = source.transfers()
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    assert events == ["setup", "active", "STOP", "RESUME", "completed"]
    assert source.query()["status"] == "completed"
    assert source.query()["downtime"] < 1000
    assert_at_work(source)
    with (tmp_path / "a").open("rb") as stream:
        summary = verify_stream(stream)
    assert summary.machine_type == source.board.machine_type
    assert all(block.missing_pages == 0 for block in summary.blocks)
    assert summary.description_sizes_agree
    analysis = Analysis((tmp_path / "a").read_bytes())  # a second, independent parser
    assert analysis.ram == {ram.idstr: ram.length_bytes for ram in source.board.rams}
    assert len(analysis.state) == len(summary.devices)
    other = made.destination(f"file:{tmp_path}/a")
    assert other.migration.wait(60)
    assert_at_work(other)
    assert other.transfers() >= before
    # A second one of the same board.
    source.migration.migrate(f"file:{tmp_path}/b")
    assert source.migration.wait(60)
    assert_at_work(source)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_many_background_snapshots_of_a_busy_guest(
    hosts: Factory, tmp_path: Path, protection: str
) -> None:
    made = hosts(protection=protection, ram_mib=24, options="rate=0 dma_us=1000")
    source = made.source()
    source.migration.set_capabilities({"background-snapshot": True})
    for number in range(5):
        time.sleep(Random(number).random() * 0.05)
        source.migration.migrate(f"file:{tmp_path}/a")
        assert source.migration.wait(60)
        paused = made.destination(f"file:{tmp_path}/a", paused=True)
        assert paused.migration.wait(60)
        assert paused.board.run_state == "paused"
        report = check_ledger(paused.ram())
        assert report.consistent, report
        paused.close()
    assert_at_work(source)


def test_without_protection_the_check_fails(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a snapshot that is taken of RAM that changes is caught."""
    made = hosts(options="rate=0")
    source = made.source()
    monkeypatch.setattr(RamCapture, "arm", lambda self: 0.0)
    monkeypatch.setattr(RamCapture, "protect_written", lambda self: self.learn_population() or 0)
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.parameters.set({"max-bandwidth": 64 << 20})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    paused = made.destination(f"file:{tmp_path}/a", paused=True)
    assert paused.migration.wait(60)
    assert not check_ledger(paused.ram()).consistent


class WritesWhileSaved:
    """A device that counts its saves in guest RAM, while it is saved."""

    OFFSET_BYTES = 3 * PAGE + 8

    def __init__(self, ledger: LedgerHost) -> None:
        self._vram = ledger.board.rams[1]
        self.saves = 0
        ledger.board.registry.register_device(
            "writes-while-saved",
            StateDescription(
                name="writes-while-saved",
                version_id=1,
                minimum_version_id=1,
                fields=(u64("saves"),),
                pre_save=lambda device: device.write(),
            ),
            self,
        )

    def write(self) -> None:
        self.saves += 1
        self._vram.write(self.OFFSET_BYTES, self.saves.to_bytes(8, "little"))


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("background", [True, False])
def test_a_device_that_writes_ram_while_it_is_saved(
    hosts: Factory, tmp_path: Path, protection: str, background: bool
) -> None:
    made = hosts(protection=protection)
    source = made.source()
    device = WritesWhileSaved(source)
    source.migration.set_capabilities({"background-snapshot": background})
    source.migration.migrate(f"file:{tmp_path}/a")
    if background:
        # What is written before it goes on belongs to the instant, whoever writes it.
        wait_until(lambda: device.saves > 0 and source.board.run_state == "running")
        # The guest's side of the instant: what comes later does not belong to it.
        source.board.rams[1].write(device.OFFSET_BYTES, b"too late")
    assert source.migration.wait(60)
    (write,) = source.query()["x-stillframe"]["writes_while_stopped"]
    assert write["idstr"] == "board.vram"
    assert (
        write["offset_bytes"]
        <= device.OFFSET_BYTES
        < (write["offset_bytes"] + write["length_bytes"])
    )
    other = made.destination()
    loaded = WritesWhileSaved(other)
    other.migration.incoming(f"file:{tmp_path}/a")
    assert other.migration.wait(60)
    assert loaded.saves == 1
    assert other.ram("board.vram")[device.OFFSET_BYTES :][:8] == (1).to_bytes(8, "little")
    assert_at_work(other)


def test_a_snapshot_file_is_loaded(hosts: Factory, tmp_path: Path) -> None:
    made = hosts()
    source = made.source()
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    with (tmp_path / "a").open("rb") as stream:
        import_stream(stream, LocalSink(tmp_path / "a.still"), stillframe_version="test")
    other = made.destination(f"file:{tmp_path}/a.still")
    assert other.migration.wait(60)
    assert_at_work(other)
    damaged = bytearray((tmp_path / "a.still").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "b.still").write_bytes(damaged)
    another = made.destination()
    another.migration.incoming(f"file:{tmp_path}/b.still")
    with pytest.raises(DataError):
        another.migration.wait(60)
    assert another.board.run_state == "inmigrate"


def test_started_paused(hosts: Factory, tmp_path: Path) -> None:
    made = hosts()
    source = made.source()
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    paused = made.destination(f"file:{tmp_path}/a", paused=True)
    assert paused.migration.wait(60)
    assert paused.board.run_state == "paused"
    paused.board.cont()
    assert_at_work(paused)
    # A snapshot of a paused guest is one of a paused guest.
    source.board.stop()
    source.migration.migrate(f"file:{tmp_path}/b")
    assert source.migration.wait(60)
    assert source.board.run_state == "paused"
    other = made.destination(f"file:{tmp_path}/b")
    assert other.migration.wait(60)
    assert other.board.run_state == "paused"


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_stream_that_is_cut_off(hosts: Factory, tmp_path: Path, seed: int) -> None:
    made = hosts(ram_mib=16, options="rate=0")
    source = made.source()
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    length = (tmp_path / "a").stat().st_size
    # Within RAM, and in the device states behind it.
    os.truncate(tmp_path / "a", length * seed // 6 if seed < 4 else length - 700 * seed)
    other = made.destination()
    other.migration.incoming(f"file:{tmp_path}/a")
    with pytest.raises(DataError):
        other.migration.wait(60)
    assert other.board.run_state == "inmigrate"
    assert other.query()["status"] == "failed"
    assert other.query()["error-desc"]


def test_a_board_for_an_incoming_migration_ends_when_that_fails(
    hosts: Factory, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"no stream at all")
    other = hosts().destination(f"file:{tmp_path}/a")
    with pytest.raises(DataError):
        other.host.wait(60)


def test_nobody_waits_for_the_migration(hosts: Factory, tmp_path: Path) -> None:
    """The monitor answers all the time: the board lock is not held while anything is sent."""
    made = hosts()
    source = made.source()
    never_done(source, 6 << 20)
    ended = threading.Event()
    source.migration.migrate(f"file:{tmp_path}/a")
    slowest = 0.0
    while source.query()["ram"]["transferred"] < 24 << 20 if "ram" in source.query() else True:
        began = time.monotonic()
        with source.board.lock:
            slowest = max(slowest, time.monotonic() - began)
        ended.wait(0.005)
    source.migration.cancel()
    assert source.migration.wait(60)
    assert slowest < 2  # of four seconds and more


def test_events_and_answers_over_qmp(hosts: Factory, tmp_path: Path) -> None:
    made = hosts()
    source = made.source(qmp=f"{tmp_path}/qmp")
    client = RawQmp(tmp_path / "qmp")
    capability: Any = {"capability": "events", "state": True}
    client.execute("migrate-set-capabilities", {"capabilities": [capability]})
    reader, writer = os.pipe()
    client.execute("getfd", {"fdname": "mig"}, (writer,))
    os.close(writer)
    client.execute("migrate-set-parameters", {"max-bandwidth": 0})
    received = bytearray()

    def drain() -> None:
        while part := os.read(reader, 1 << 20):
            received.extend(part)

    thread = threading.Thread(target=drain)
    thread.start()
    client.execute("migrate", {"uri": "fd:mig"})
    assert source.migration.wait(60)
    thread.join()
    os.close(reader)
    assert client.execute("query-status")["status"] == "postmigrate"
    told = [e["data"]["status"] for e in client.events if e["event"] == "MIGRATION"]
    assert told == ["setup", "active", "device", "completed"]
    names = [event["event"] for event in client.events]
    assert names.count("STOP") == 1
    assert {"MIGRATION_PASS"} <= set(names)
    (tmp_path / "a").write_bytes(received)
    other = made.destination(f"file:{tmp_path}/a")
    assert other.migration.wait(60)
    assert_at_work(other)


def test_ram_that_is_written_after_the_switch_over(hosts: Factory, tmp_path: Path) -> None:
    """The destination would have some of it as it was, and some as it is."""
    made = hosts(options="rate=0")
    source, other = made.source(), made.destination()
    start_postcopy(source, other, tmp_path / "s")
    assert source.query()["status"] == "postcopy-active"
    source.board.rams[1].write(8, b"too late")
    with pytest.raises(SnapshotFailed) as caught:
        source.migration.wait(60)
    assert "board.vram" in str(caught.value)
    assert caught.value.guest_state == "paused"
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    assert source.board.run_state == "postmigrate"
    assert other.board.run_state == "internal-error"


def nearly_full(statistics: dict[str, Any]) -> bool:
    """Whether the next page that the guest writes has to wait for room, or the one after it."""
    return bool(statistics["spill_used_bytes"] > statistics["spill_limit_bytes"] - (128 << 10))


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_quit_while_the_guest_waits_for_a_reader(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    """A vCPU waits for room, and only the migration can let it go."""
    small = functools.partial(SnapshotOptions, spill_bytes=2 << 20)
    monkeypatch.setattr(background, "SnapshotOptions", small)
    made = hosts(protection=protection, options="rate=0")
    source = made.source(qmp=f"{tmp_path}/qmp")
    source.migration.set_capabilities({"background-snapshot": True})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        source.migration.migrate(f"unix:{tmp_path}/s")
        reader, _ = listener.accept()  # and never reads
        with reader:
            wait_until(lambda: nearly_full(source.query()["x-stillframe"]))
            RawQmp(tmp_path / "qmp").execute("quit")
            assert source.board.wait(60)
    assert source.query()["status"] == "cancelled"


def stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it sends nothing, and answers no request; it can be interrupted."""

    def nothing(self: LiveTransfer, bytes_per_s: int) -> None:
        wait_until(lambda: self.task.interrupt.is_set)
        raise SinkError("it was interrupted")

    monkeypatch.setattr(LiveTransfer, "iterate", nothing)


def test_quit_while_the_guest_waits_for_a_page(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hosts(options="rate=0")
    source, other = made.source(), made.destination(qmp=f"{tmp_path}/qmp")
    start_postcopy(source, other, tmp_path / "s")
    stall(monkeypatch)
    wait_until(lambda: other.board.run_state == "running")
    asked_before = -1

    def waits() -> bool:
        """The guest asked for pages, and goes no further."""
        nonlocal asked_before
        asked, before = source.query()["ram"]["postcopy-requests"], asked_before
        asked_before = asked
        return bool(asked) and asked == before

    wait_until(waits)
    RawQmp(tmp_path / "qmp").execute("quit")
    assert other.board.wait(60)
    assert other.query()["status"] == "failed"


_WRITES_A_LOST_PAGE = """
void _start(struct info *info, u64 cpu)
{
    volatile u64 *fill = (volatile u64 *)0x1000000;
    for (u64 n = 0; n < (24u << 20) / 8; n++) fill[n] = 0xababababababababULL;
    results[0] = 1;
    while (results[1] == 0) ;
    out32(0x540, 0); out32(0x544, 0); out32(0x548, 0x1000000 + (20u << 20)); out32(0x54c, 0);
    out32(0x550, 64); out32(0x554, 2);
    while (in32(0x558) == 1) ;
    halt();
}
"""


_LOST_FROM = 0x1000000 + (20 << 20)


def test_a_page_that_never_comes_is_not_written_to_the_disk(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block device waits for it when the source dies."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xcd" * (1 << 20))
    config = BoardConfig(
        guest_path=compile_guest(_WRITES_A_LOST_PAGE), ram_bytes=64 << 20, disk_path=str(disk)
    )
    request = TrackedRam.request

    def ignore_some(self: TrackedRam, wanted: PageRequest) -> None:
        if not _LOST_FROM <= wanted.offset_bytes < _LOST_FROM + (64 << 10):
            request(self, wanted)

    monkeypatch.setattr(TrackedRam, "request", ignore_some)
    with start_host(config) as source, start_host(config, incoming="defer") as other:
        for host in (source, other):
            host.migration.set_capabilities({"postcopy-ram": True})
        wait_until(lambda: source.board.rams[0].read(RESULTS, 1) == b"\1")
        other.migration.incoming(f"unix:{tmp_path}/s")
        source.migration.parameters.set({"max-bandwidth": 2 << 20, "downtime-limit": 0})
        source.migration.parameters.set({"max-postcopy-bandwidth": 1 << 20})
        source.migration.migrate(f"unix:{tmp_path}/s")
        source.migration.start_postcopy()
        wait_until(lambda: other.board.run_state == "running")
        other.board.rams[0].write(RESULTS + 8, b"\1")
        wait_until(lambda: other.board.hardware.block.status == BUSY)
        source.migration._outgoing.interrupt.set()  # type: ignore[union-attr]
        with pytest.raises(StillframeError):
            other.migration.wait(60)
        assert other.board.run_state == "internal-error"
    assert disk.read_bytes() == b"\xcd" * (1 << 20)
