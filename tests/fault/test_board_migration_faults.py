"""What can go wrong in a migration of the board, at every named point: the guest goes on where it
belongs, and never in two places."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillframe.errors import InternalError, SinkError, StillframeError
from stillframe.snapshot import faultpoints
from stillframe.snapshot.faultpoints import POINTS
from tests.support.ledger_host import LedgerHost, LedgerHosts
from tests.support.raw_qmp import RawQmp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.waiting import wait_until

Factory = Callable[..., LedgerHosts]

PRECOPY_POINTS = (
    "attached",
    "registered",
    "armed",
    "first-batch",
    "stopped",
    "devices",
    "sent",
)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Factory]:
    with ExitStack() as stack:
        yield lambda **options: LedgerHosts(stack, tmp_path, **options)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def switch_on(point: str) -> None:
        monkeypatch.setattr(faultpoints, "_seen", {})
        monkeypatch.setenv("STILLFRAME_FAULT", point)

    return switch_on


def assert_goes_on(ledger: LedgerHost) -> None:
    assert ledger.board.run_state == "running"
    audit = ledger.audit()
    assert audit.startswith("AUDIT ok"), audit
    before = ledger.transfers()
    wait_until(lambda: ledger.transfers() > before)


def assert_another_one_works(ledger: LedgerHost, directory: Path) -> None:
    """Nothing was left behind that would be in its way."""
    os.environ.pop("STILLFRAME_FAULT", None)
    ledger.migration.set_capabilities({"background-snapshot": True, "postcopy-ram": False})
    ledger.migration.migrate(f"file:{directory}/again")
    assert ledger.migration.wait(60)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("protection", ["userfaultfd", "mprotect"])
def test_an_exception_in_a_background_snapshot(
    hosts: Factory, tmp_path: Path, fault: Callable[[str], None], point: str, protection: str
) -> None:
    source = hosts(protection=protection).source()
    (tmp_path / "out").mkdir()
    source.migration.set_capabilities({"background-snapshot": True})
    fault(point)
    source.migration.migrate(f"file:{tmp_path}/out/a")
    with pytest.raises(InternalError) as caught:
        source.migration.wait(60)
    assert point in str(caught.value)
    assert source.query()["status"] == "failed"
    assert os.listdir(tmp_path / "out") == []
    assert_goes_on(source)
    assert_another_one_works(source, tmp_path)


@pytest.mark.parametrize("point", PRECOPY_POINTS)
def test_an_exception_in_precopy(
    hosts: Factory, tmp_path: Path, fault: Callable[[str], None], point: str
) -> None:
    made = hosts()
    source, other = made.source(), made.destination()
    other.migration.incoming(f"unix:{tmp_path}/s")
    source.migration.parameters.set({"max-bandwidth": 0})
    fault(point)
    source.migration.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(InternalError):
        source.migration.wait(60)
    assert_goes_on(source)
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    assert other.board.run_state == "inmigrate"
    assert_another_one_works(source, tmp_path)


@pytest.mark.parametrize("point", ["stopped", "devices", "switched-over"])
def test_an_exception_in_the_switch_over(
    hosts: Factory, tmp_path: Path, fault: Callable[[str], None], point: str
) -> None:
    made = hosts()
    source, other = made.source(), made.destination()
    for ledger in (source, other):
        ledger.migration.set_capabilities({"postcopy-ram": True})
    source.migration.parameters.set({"max-bandwidth": 24 << 20, "downtime-limit": 0})
    other.migration.incoming(f"unix:{tmp_path}/s")
    fault(point)
    source.migration.migrate(f"unix:{tmp_path}/s")
    source.migration.start_postcopy()
    with pytest.raises(InternalError):
        source.migration.wait(60)
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    if point == "switched-over":
        # It runs nowhere: the destination lacks RAM, and the source may not decide.
        assert source.board.run_state == "postmigrate"
        # If it notices before it starts the guest it never does.
        assert other.board.run_state in ("internal-error", "inmigrate")
        return
    assert other.board.run_state == "inmigrate"
    assert_goes_on(source)
    assert_another_one_works(source, tmp_path)


def test_every_point_is_reached(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that is never reached would make its test above pass for nothing."""
    reached: set[str] = set()
    monkeypatch.setattr(faultpoints, "reach", reached.add)
    made = hosts(ram_mib=16)
    source, other = made.source(), made.destination(f"unix:{tmp_path}/s")
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    assert reached == set(POINTS)
    reached.clear()
    source.migration.set_capabilities({"background-snapshot": False})
    source.migration.migrate(f"unix:{tmp_path}/s")
    assert source.migration.wait(60)
    assert reached == set(PRECOPY_POINTS)
    assert other.migration.wait(60)


@pytest.mark.parametrize("point", ["armed", "first-batch", "stopped", "devices", "sent"])
def test_the_source_is_killed(hosts: Factory, tmp_path: Path, point: str) -> None:
    """Then the guest is gone; but what was half sent does not run."""
    made = hosts()
    other = made.destination()
    other.migration.incoming(f"unix:{tmp_path}/s")
    process = made.source_process(f"unix:{tmp_path}/s", {"STILLFRAME_FAULT": f"{point}=kill"})
    with pytest.raises(StillframeError):
        other.migration.wait(60)
    assert process.wait(60) == -9
    assert other.board.run_state == "inmigrate"
    assert other.query()["status"] == "failed"


def test_a_destination_with_other_devices(hosts: Factory, tmp_path: Path) -> None:
    """It finds out when the source stands still already."""
    source = hosts(vcpus=2).source()
    other = LedgerHosts(ExitStack(), tmp_path / "other", vcpus=1)
    (tmp_path / "other").mkdir()
    destination = other.destination()
    try:
        destination.migration.incoming(f"unix:{tmp_path}/s")
        source.migration.migrate(f"unix:{tmp_path}/s")
        with pytest.raises(SinkError) as caught:
            source.migration.wait(60)
        assert "Sibling indicated error 1" in str(caught.value)
        with pytest.raises(StillframeError) as theirs:
            destination.migration.wait(60)
        assert "unknown section" in str(theirs.value)
        assert destination.board.run_state == "inmigrate"
        assert_goes_on(source)
    finally:
        destination.close()


@pytest.mark.parametrize("background", [True, False])
def test_full_disk(hosts: Factory, tmp_path: Path, background: bool) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=4m") as place:
        source = hosts().source()
        source.migration.set_capabilities({"background-snapshot": background})
        source.migration.migrate(f"file:{place}/a")
        with pytest.raises(SinkError) as caught:
            source.migration.wait(60)
        assert "No space left on device" in str(caught.value)
        assert os.listdir(place) == []
        assert_goes_on(source)


@pytest.mark.parametrize("command", ["stop", "cont", "system_reset"])
@pytest.mark.parametrize("point", ["stopped", "devices", "protected"])
def test_another_clients_command_in_the_downtime_waits(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, command: str
) -> None:
    made = hosts(ram_mib=24)
    source = made.source(qmp=str(tmp_path / "qmp"))
    client = RawQmp(tmp_path / "qmp")
    answers: list[object] = []
    asking: list[threading.Thread] = []

    def ask() -> None:
        answers.append(client.command(command))

    def reach(reached: str) -> None:
        if reached == point and not asking:
            asking.append(threading.Thread(target=ask, daemon=True))
            asking[0].start()
            asking[0].join(0.1)
            assert asking[0].is_alive(), answers

    monkeypatch.setattr(faultpoints, "reach", reach)
    source.migration.set_capabilities({"background-snapshot": True})
    source.migration.migrate(f"file:{tmp_path}/a")
    assert source.migration.wait(60)
    asking[0].join(60)
    assert "return" in answers[0], answers  # type: ignore[operator]
    assert source.board.run_state == ("paused" if command == "stop" else "running")
    other = made.destination(f"file:{tmp_path}/a")
    assert other.migration.wait(60)
    assert_goes_on(other)


def test_a_stop_in_the_switch_over_counts_when_it_fails(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hosts(ram_mib=16)
    source, other = made.source(qmp=str(tmp_path / "qmp")), made.destination()
    other.migration.incoming(f"unix:{tmp_path}/s")
    client = RawQmp(tmp_path / "qmp")

    def reach(point: str) -> None:
        if point == "stopped":
            assert "error" in client.command("cont")
            assert "error" in client.command("system_reset")
            assert client.command("stop")["return"] == {}
            raise SinkError("a test's")

    monkeypatch.setattr(faultpoints, "reach", reach)
    source.migration.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError):
        source.migration.wait(60)
    assert source.board.run_state == "paused"
    monkeypatch.undo()
    source.board.cont()
    assert_goes_on(source)


def test_the_destination_is_killed_before_the_last_word(
    hosts: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has loaded everything; without the stream's end it has not started the guest."""
    made = hosts()
    source = made.source()
    process = made.destination_process(f"unix:{tmp_path}/s")

    def kill(point: str) -> None:
        if point == "sent":
            process.kill()
            process.wait()

    monkeypatch.setattr(faultpoints, "reach", kill)
    source.migration.migrate(f"unix:{tmp_path}/s")
    with pytest.raises(SinkError) as caught:
        source.migration.wait(60)
    assert caught.value.guest_state == "running"
    assert_goes_on(source)
