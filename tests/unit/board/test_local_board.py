"""The board as its own snapshot job sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from stillframe.board.local_board import LocalBoard
from stillframe.board.state.fields import StateDescription, u32
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import MachineError
from stillframe.machine import Machine
from stillframe.model import StoppedWrite
from stillframe.snapshot.guard import NoGuard, guard_of
from stillframe.snapshot.instant import take_instant
from stillframe.snapshot.pause_watch import PauseWatch
from stillframe.vmstate.devices import unpack_run_state
from tests.unit.board.tiny import TIMEOUT_S, Tiny

SPIN = "void _start(struct info *info, u64 cpu) { for (;;) results[cpu]++; }"
SPILL_BYTES = 4 << 20


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    with Tiny(SPIN, vcpus=2) as tiny:
        tiny.board.power_on()
        tiny.until(lambda: all(tiny.results(2)))
        yield tiny


def stored_run_state(device_state: bytes) -> str:
    """From the payload of the globalstate section, which follows its name and two numbers."""
    name = b"\x0bglobalstate"
    start = device_state.index(name) + len(name) + 8
    payload = device_state[start : start + 104]
    return unpack_run_state(int.from_bytes(payload[:4], "big"), payload[4:36])


def test_what_it_tells(tiny: Tiny) -> None:
    machine: Machine = LocalBoard(tiny.board)
    assert machine.pid == os.getpid()
    assert machine.process_alive()
    assert machine.monitor_fd() is None
    assert isinstance(guard_of(None), NoGuard)
    record = machine.describe()
    assert (record.machine_type, record.accelerator) == ("stillframe-board-1", "unicorn")
    assert (record.vcpus, record.guest_state, record.disks) == (2, "running", ())
    blocks = machine.ram_blocks()
    assert [block.idstr for block in blocks] == ["board.ram", "board.vram"]
    assert [place.gpa for place in machine.memory_map(blocks[1:])] == [0xE0000000]
    signature = machine.blocks_signature()
    assert machine.blocks_signature() == signature
    tiny.board.plug_dimm(1 << 20)
    assert machine.blocks_signature() != signature
    machine.close()


def test_blockers(tiny: Tiny) -> None:
    machine = LocalBoard(tiny.board)
    assert machine.preflight() == []
    assert machine.preflight(moment="stop") == []
    tiny.board.blockers.append("a device of another world")
    [blocker] = machine.preflight()
    assert (blocker.severity, blocker.reason) == ("refuse", "a device of another world")
    assert machine.preflight(moment="stop") == [blocker]
    assert machine.preflight(moment="saved") == []
    tiny.board.blockers.remove("a device of another world")
    assert machine.preflight() == []


def test_what_is_stored_is_the_state_before_the_stop(tiny: Tiny) -> None:
    machine = LocalBoard(tiny.board)
    machine.stop()
    assert machine.status() == "save-vm"
    assert stored_run_state(machine.save_device_state()) == "running"
    machine.cont()
    assert machine.status() == "running"
    tiny.board.stop()
    machine.stop()
    assert machine.status() == "paused"
    assert stored_run_state(machine.save_device_state()) == "paused"
    machine.cont()
    assert machine.status() == "paused", "nobody asked for that"


@pytest.mark.parametrize(
    ("command", "events", "state"),
    [
        ("stop", ["STOP", "RESUME", "STOP"], "paused"),
        ("cont", ["STOP", "RESUME"], "running"),
        ("reset", ["STOP", "RESUME", "RESET"], "running"),
    ],
)
def test_what_others_want_in_the_downtime_waits_until_it_is_over(
    tiny: Tiny, command: str, events: list[str], state: str
) -> None:
    machine = LocalBoard(tiny.board)
    tiny.told()
    machine.stop()
    other = threading.Thread(target=getattr(tiny.board, command), daemon=True)
    other.start()
    other.join(0.1)
    assert other.is_alive()
    assert stored_run_state(machine.save_device_state()) == "running"
    machine.cont()
    other.join(TIMEOUT_S)
    assert tiny.told() == events
    assert machine.status() == state


def test_a_guest_that_ended_before_its_stop_stays_ended(tiny: Tiny) -> None:
    machine = LocalBoard(tiny.board)
    with tiny.board._control.quiesced():
        stopper = threading.Thread(target=machine.stop, daemon=True)
        stopper.start()
        stopper.join(0.1)
        assert stopper.is_alive()
        tiny.board._control.set_state("shutdown")
    stopper.join(TIMEOUT_S)
    machine.resume_at_all_costs()
    assert machine.status() == "shutdown"
    tiny.board.reset()
    assert machine.status() == "prelaunch", "it is nobody's"


def test_a_running_guest_cannot_be_saved(tiny: Tiny) -> None:
    with pytest.raises(MachineError, match="vCPU 0 runs"):
        LocalBoard(tiny.board).save_device_state()


class Meddler:
    """A device that writes to guest RAM while its state is saved (invariant 8)."""

    value = 7

    def __init__(self, tiny: Tiny) -> None:
        self.ram = tiny.board.rams[0]

    def meddle(self) -> None:
        self.ram.write(0xA00010, b"meddled")
        self.ram.write(0xA03000, b"again")


MEDDLER = StateDescription(
    name="meddler",
    version_id=1,
    minimum_version_id=1,
    fields=(u32("value"),),
    pre_save=lambda device: device.meddle(),
)


def test_a_device_that_writes_ram_while_it_is_saved_is_caught(tiny: Tiny) -> None:
    tiny.board.registry.register_device("meddler", MEDDLER, Meddler(tiny))
    machine = LocalBoard(tiny.board)
    protection = machine.open_write_protection()
    capture = RamCapture(protection, machine.pid, machine.ram_blocks(), spill_bytes=SPILL_BYTES)
    watch = machine.watch()
    try:
        capture.register()
        capture.start()
        capture.arm()
        instant = take_instant(
            machine, guard_of(machine.monitor_fd()), capture, PauseWatch(watch), run_state="running"
        )
    finally:
        capture.release()
        capture.close()
        protection.close()
        watch.close()
    # In chunks of what protects it.
    assert {write.idstr for write in instant.writes} == {"board.ram"}
    for offset in (0xA00000, 0xA03000):
        assert any(
            write.offset_bytes <= offset < write.offset_bytes + write.length_bytes
            for write in instant.writes
        )
    assert sum(write.length_bytes for write in instant.writes) <= 2 * 64 << 10
    assert machine.status() == "running"
    assert [event.name for event in watch.seen()] == ["STOP", "RESUME"]
    assert instant.downtime.total_ms > 0
    assert isinstance(instant.writes[0], StoppedWrite)
    assert stored_run_state(instant.device_state) == "running"
