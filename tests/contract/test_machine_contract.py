"""One suite for every machine: what ``stillframe.machine.Machine`` promises.

A stock QEMU, a board of another process, and a board of this process, seen from inside.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.local_board import LocalBoard
from stillframe.board.process_board import ProcessBoard
from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import BusyError, SnapshotCancelled, SnapshotFailed
from stillframe.machine import Machine
from stillframe.machine.finding import connect
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.snapshot.early_reader import Asking, NoReader
from stillframe.snapshot.exclusive import VmLock
from stillframe.snapshot.hold import Hold
from stillframe.snapshot.job import JobControl
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.output import NoOutput, StreamOutput
from stillframe.snapshot.stream_framing import StreamFraming
from stillframe.snapshot.take import take_held, take_into, take_snapshot
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.still.frames import BytesLike
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from stillframe.vmstate import devices
from stillframe.vmstate.wire import SectionType
from stillframe.vmstate.writer import stream_header
from tests.support.bare_vm import BareVm
from tests.support.board_process import BoardProcess
from tests.support.probes import has_qemu, has_uffd_wp
from tests.support.ram_truth import RamTruth
from tests.support.stream_summary import verify_stream
from tests.support.tiny_guest import write_guest
from tests.support_store.memory import MemorySink, MemorySource

COUNTS = b"\x48\xff\x04\x25\x00\x00\x80\x00\xeb\xf6"
"""A board's guest: ``incq 0x800000; jmp``."""
RAM_BYTES = 16 << 20


def qemu(stack: ExitStack, directory: Path) -> Machine:
    has_qemu().require()
    vm = stack.enter_context(BareVm("-m", "16"))
    return stack.enter_context(connect(vm.qmp))


def board_outside(stack: ExitStack, directory: Path) -> Machine:
    guest = write_guest(directory / "guest.elf", COUNTS)
    board = stack.enter_context(BoardProcess(guest, "--ram", "16M", directory=directory))
    return stack.enter_context(connect(str(board.qmp)))


def board_inside(stack: ExitStack, directory: Path) -> Machine:
    guest = write_guest(directory / "guest.elf", COUNTS)
    board = Board(BoardConfig(guest_path=guest, ram_bytes=RAM_BYTES, serial="none"))
    stack.callback(board.close)
    board.power_on()
    machine = LocalBoard(board)
    stack.callback(machine.resume_at_all_costs)  # else a failed test leaves it held for good
    return machine


KINDS = {"qemu": qemu, "board outside": board_outside, "board inside": board_inside}


PARAMETERS = [
    pytest.param(make, id=name, marks=[pytest.mark.qemu] if name == "qemu" else [])
    for name, make in KINDS.items()
]


@pytest.fixture(params=PARAMETERS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    has_uffd_wp().require()
    with ExitStack() as stack:
        yield request.param(stack, tmp_path)


def device_state(machine: Machine) -> bytes:
    machine.prepare_device_state()
    try:
        return machine.save_device_state()
    finally:
        machine.finish_device_state()


def take(machine: Machine, **options: object) -> tuple[TakenSnapshot, Snapshot]:
    sink = MemorySink()
    taken = take_snapshot(JobControl(), machine, sink, SnapshotOptions(**options))  # type: ignore[arg-type]
    return taken, Snapshot(MemorySource(sink.content))


def test_it_is_what_it_is_called(machine: Machine) -> None:
    assert isinstance(machine, QemuMachine | ProcessBoard | LocalBoard)
    assert machine.process_alive()
    assert Path(f"/proc/{machine.pid}").is_dir()
    assert machine.lock_name == machine.lock_name
    assert (machine.monitor_fd() is None) == (machine.pid == os.getpid())
    record = machine.describe()
    assert (record.pid, record.uid) == (machine.pid, os.getuid())
    assert record.argv
    assert record.machine_type
    assert not record.machine_type.endswith("-machine")
    assert (record.guest_state, record.vcpus) == ("running", 1)


def test_its_ram_is_listed_whole_and_the_same_again(machine: Machine) -> None:
    blocks = machine.ram_blocks()
    signature = machine.blocks_signature()
    assert len({block.idstr for block in blocks}) == len(blocks)
    assert max(block.used_length_bytes for block in blocks) == RAM_BYTES
    for block in blocks:
        assert 0 < block.used_length_bytes <= block.max_length_bytes
        assert block.hva % block.page_size_bytes == 0
    machine.stop()
    machine.cont()
    assert machine.ram_blocks() == blocks
    assert machine.blocks_signature() == signature
    lengths = {block.idstr: block.used_length_bytes for block in blocks}
    end = 0
    for place in machine.memory_map(blocks):
        assert place.gpa >= end
        assert place.offset_bytes + place.length_bytes <= lengths[place.idstr]
        end = place.gpa + place.length_bytes


def test_nothing_stands_in_the_way_of_a_plain_one(machine: Machine) -> None:
    assert [found for found in machine.preflight() if found.severity == "refuse"] == []
    assert [found for found in machine.preflight(moment="stop") if found.severity != "warn"] == []


def test_it_stops_and_goes_on_and_tells(machine: Machine) -> None:
    watch = machine.watch()
    before_s = time.monotonic()
    machine.stop()
    machine.stop()
    assert machine.status() != "running"
    machine.cont()
    assert machine.status() == "running"
    machine.stop()
    machine.resume_at_all_costs()
    assert machine.status() == "running"
    seen = watch.seen()
    assert [event.name for event in seen] == ["STOP", "RESUME"] * 2
    times = [event.received_s for event in seen]
    assert before_s <= times[0]
    assert times == sorted(times)
    watch.close()
    watch.close()


def test_its_device_state_is_a_stream_and_the_same_twice(machine: Machine) -> None:
    machine.stop()
    stopped = machine.status()
    first, second = device_state(machine), device_state(machine)
    assert machine.status() == stopped
    assert first.startswith(stream_header())
    sections, description = devices.split_description(first)
    assert not description or description[0] == SectionType.VMDESCRIPTION
    names = [section.idstr for section in devices.split_device_state(sections)]
    assert names
    assert "ram" not in names
    assert len(first) == len(second)
    assert names == [
        section.idstr
        for section in devices.split_device_state(devices.split_description(second)[0])
    ]
    machine.finish_device_state()
    machine.cont()


def test_its_ram_can_be_write_protected_while_it_runs(machine: Machine) -> None:
    protection = machine.open_write_protection()
    capture = RamCapture(protection, machine.pid, machine.ram_blocks(), spill_bytes=4 << 20)
    try:
        capture.register()
        capture.start()
        capture.arm()
        assert machine.status() == "running"
    finally:
        capture.release()
        capture.close()
        protection.close()
    machine.stop()  # which waits for a vCPU that a fault held up
    machine.cont()


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_a_snapshot_of_it_is_sound(machine: Machine, mode: str) -> None:
    for _ in range(2):
        taken, snapshot = take(machine, mode=mode)
        assert machine.status() == "running"
        assert taken.statistics.state == "completed"
        assert snapshot.verify()
        manifest = snapshot.manifest
        assert manifest.machine is not None
        assert manifest.machine.argv == machine.describe().argv
        assert [block.idstr for block in manifest.blocks] == [
            block.idstr for block in machine.ram_blocks()
        ]
        assert devices.run_state(snapshot.skeleton().devices) == "running"


def test_a_guest_that_was_paused_stays_so(machine: Machine) -> None:
    machine.stop()
    paused = machine.status()
    if machine.pid == os.getpid():  # its own stop is one to save, and another's must not see it
        machine.cont()
        assert isinstance(machine, LocalBoard)
        machine._board.stop()
        paused = "paused"
    _, snapshot = take(machine)
    assert machine.status() == paused
    assert devices.run_state(snapshot.skeleton().devices) == paused


def test_its_stream_goes_out_as_it_is(machine: Machine) -> None:
    sink = MemorySink()
    taken = take_into(JobControl(), machine, StreamOutput(sink), SnapshotOptions(workers=1))
    assert taken.id == ""
    assert len(sink.content) == taken.statistics.file_bytes
    summary = verify_stream(io.BytesIO(sink.content))
    assert {block.idstr for block in summary.blocks} == {
        block.idstr for block in machine.ram_blocks()
    }
    assert all(block.missing_pages == 0 for block in summary.blocks)
    assert summary.machine_type == machine.describe().machine_type


def test_one_snapshot_at_a_time(machine: Machine) -> None:
    lock = VmLock(machine.lock_name)
    try:
        with pytest.raises(BusyError) as caught:
            take(machine)
    finally:
        lock.close()
    assert caught.value.guest_state == "running"
    take(machine)


@pytest.mark.parametrize("phase", ["attaching", "arming", "saving", "syncing"])
def test_given_up_at_any_phase_it_goes_on(machine: Machine, phase: str) -> None:
    control = JobControl(lambda now: _cancel_at(phase, now.phase, lambda: control.cancel()))
    sink = MemorySink()
    with pytest.raises(SnapshotCancelled) as caught:
        take_snapshot(control, machine, sink, SnapshotOptions())
    assert caught.value.guest_state == "running"
    assert machine.status() == "running"
    assert control.end(failed=True) == "cancelled"
    take(machine)


def _cancel_at(wanted: str, phase: str, cancel: Callable[[], object]) -> None:
    if phase == wanted:
        cancel()


class HardReader(NoReader):
    """What is captured is too much for it, or it is never ready."""

    def __init__(self, on_wait: Callable[[], object], failure: Exception | None = None) -> None:
        self._on_wait, self._failure = on_wait, failure
        self.left_when_stopped: list[int] = []

    def begin(
        self, parts: StreamFraming, ram: RamCapture, new_asking: Callable[[], Asking]
    ) -> None:
        self._ram = ram

    def pages(self, raw: BytesLike, runs: bytes) -> None:
        if self._failure is not None:
            raise self._failure

    def stop_asking(self) -> None:
        # Of a capture that is still open.
        self.left_when_stopped.append(sum(map(len, self._ram.populated_runs())))

    def is_ready(self, timeout_s: float) -> bool:
        self._on_wait()
        return False


def test_a_reader_that_is_never_ready_is_given_up(machine: Machine) -> None:
    control = JobControl()
    reader = HardReader(control.cancel)
    with pytest.raises(SnapshotCancelled):
        take_into(control, machine, NoOutput(), SnapshotOptions(), reader)
    assert machine.status() == "running"


def test_a_reader_asks_no_more_once_it_has_failed(machine: Machine) -> None:
    reader = HardReader(lambda: None, SnapshotFailed("too much", guest_state="running"))
    with pytest.raises(SnapshotFailed, match="too much"):
        take_into(JobControl(), machine, NoOutput(), SnapshotOptions(), reader)
    assert machine.status() == "running"
    assert reader.left_when_stopped
    assert all(reader.left_when_stopped)


def test_it_stays_armed_and_the_next_snapshot_holds_what_changed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = RamTruth(monkeypatch)
    contents: dict[str, bytes] = {}
    with closing(Hold(machine, stay=True)) as hold:
        for number in range(4):
            sink = MemorySink()
            output = SnapshotWriter(sink, increment=hold.last is not None)
            taken = take_held(JobControl(), hold, output, SnapshotOptions())
            assert hold.interruption() is None
            contents[taken.id] = sink.content
            with Snapshot(
                MemorySource(sink.content),
                resolve=lambda child: MemorySource(contents[child.manifest.parent.id]),
            ) as snapshot:
                assert truth.differences(snapshot) == []
            assert (taken.statistics.pages.unchanged > 0) == (number > 0)
    assert machine.status() == "running"
