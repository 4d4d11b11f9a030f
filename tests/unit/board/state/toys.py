"""A small machine for tests of saving and loading: RAM in parts, devices, a plain handler."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from stillframe.board.state.fields import (
    StateDescription,
    boolean,
    buffer,
    struct_array,
    u8,
    u32,
    u64,
)
from stillframe.board.state.global_state import GLOBAL_STATE, GlobalState
from stillframe.board.state.handlers import Output, SaveStateHandler, SaveStateRegistry
from stillframe.board.state.load_state import OnCommand, StateLoader
from stillframe.board.state.save_state import StateSaver
from stillframe.vmstate import writer
from stillframe.vmstate.page_records import detected_records
from stillframe.vmstate.ram_reader import RamReader
from stillframe.vmstate.records import Pages, RamBlocks, ZeroRun
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import RAM_IDSTR, RAM_VERSION

PAGE = 4096
MACHINE = "toy-board-1"


class ToyRam:
    """Blocks of RAM that go out a page at a time; with ``postcopy`` what is left goes later."""

    iterable = True

    def __init__(self, blocks: dict[str, bytes]) -> None:
        self.blocks = {name: bytearray(content) for name, content in blocks.items()}
        self.active = True
        self.postcopy = False
        self.calls: list[str] = []
        self._left: list[tuple[str, int]] = []
        self._reader: RamReader | None = None

    def is_active(self) -> bool:
        return self.active

    def has_postcopy(self) -> bool:
        return self.postcopy

    def setup(self, out: Output) -> None:
        self.calls.append("setup")
        self._left = [
            (name, offset)
            for name, content in self.blocks.items()
            for offset in range(0, len(content), PAGE)
        ]
        out.write(writer.ram_block_list([(n, len(c)) for n, c in self.blocks.items()]))

    def iterate(self, out: Output) -> bool:
        self.calls.append("iterate")
        self._pages(out, 1)
        return not self._left

    def complete_precopy(self, out: Output) -> None:
        self.calls.append("complete_precopy")
        self._pages(out, len(self._left))

    def complete_postcopy(self, out: Output) -> None:
        self.calls.append("complete_postcopy")
        self._pages(out, len(self._left))

    def save(self, out: Output) -> None:
        raise AssertionError("RAM has no FULL section")

    def cleanup(self) -> None:
        self.calls.append("cleanup")

    def _pages(self, out: Output, count: int) -> None:
        for _ in range(min(count, len(self._left))):
            name, offset = self._left.pop(0)
            page = bytes(self.blocks[name][offset : offset + PAGE])
            out.write(detected_records(offset, page, block=name)[0])
        out.write(writer.ram_eos())

    def load(self, source: StreamSource, version_id: int) -> None:
        assert version_id == RAM_VERSION
        if self._reader is None:
            self._reader = RamReader(source, page_bytes=PAGE, page_lookup=None)
            for event in self._reader.read_block_list(
                addresses=False, page_sizes=False, mapped=False
            ):
                assert isinstance(event, RamBlocks)
                self._names = [block.idstr for block in event.blocks]
        for run in self._reader.read_records():
            content = self.blocks[self._names[run.block_index]]
            if isinstance(run, Pages):
                content[run.offset_bytes : run.offset_bytes + len(run.data)] = run.data
            elif isinstance(run, ZeroRun):
                length = run.pages * PAGE
                content[run.offset_bytes : run.offset_bytes + length] = bytes(length)


class ToyNotes(SaveStateHandler):
    """A handler that is no declared device: a length and as many bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.cleaned = 0

    def save(self, out: Output) -> None:
        out.write(bytes((len(self.text),)))
        out.write(self.text)

    def load(self, source: StreamSource, version_id: int) -> None:
        self.text = source.take(source.u8("notes"), "notes")

    def cleanup(self) -> None:
        self.cleaned += 1


CHANNEL = StateDescription(
    name="channel", version_id=1, minimum_version_id=1, fields=(u8("mode"), u32("count"))
)

TIMER = StateDescription(
    name="timer",
    version_id=3,
    minimum_version_id=1,
    fields=(
        u64("now_ns"),
        u8("control"),
        struct_array("channels", CHANNEL, 2, since=2),
        boolean("latched", since=3),
        buffer("name", 4),
    ),
    subsections=(
        StateDescription(
            name="timer/overrun",
            version_id=1,
            minimum_version_id=1,
            fields=(u32("overrun"),),
            needed=lambda device: bool(device.overrun),
        ),
    ),
)


def timer(**changes: Any) -> SimpleNamespace:
    """A timer at reset, but for the changes."""
    device = SimpleNamespace(
        now_ns=0,
        control=0,
        channels=[SimpleNamespace(mode=0, count=0) for _ in range(2)],
        latched=False,
        name=b"none",
        overrun=0,
    )
    vars(device).update(changes)
    return device


class ToyMachine:
    """RAM, timer, notes and the run state, registered in an order that priorities change."""

    def __init__(self, *, run_state: str = "running", pages: dict[str, bytes] | None = None):
        self.ram = ToyRam(pages or {"toy.ram": bytes(2 * PAGE)})
        self.timer = timer()
        self.notes = ToyNotes(b"")
        self.run_state = GlobalState(lambda: run_state)
        self.registry = SaveStateRegistry()
        self.registry.register_device("globalstate", GLOBAL_STATE, self.run_state, priority=-1)
        self.registry.register_device("toy/timer", TIMER, self.timer)
        self.registry.register("notes", self.notes, version_id=7, instance_id=5)
        self.registry.register(RAM_IDSTR, self.ram, version_id=RAM_VERSION, priority=10)
        self.inactivated = 0
        self.saver = StateSaver(
            self.registry, machine_type=MACHINE, inactivate_disks=self._inactivate
        )

    def _inactivate(self) -> None:
        self.inactivated += 1

    def stream(self) -> bytes:
        """A whole precopy stream."""
        out = io.BytesIO()
        self.saver.header(out)
        self.saver.setup(out)
        self.saver.iterate(out)
        self.saver.complete_precopy(out, iterable_only=False, inactivate_disks=True)
        self.saver.cleanup()
        return out.getvalue()

    def loader(self, on_command: OnCommand | None = None) -> StateLoader:
        return StateLoader(self.registry, machine_type=MACHINE, on_command=on_command)

    def load(self, data: bytes) -> StreamSource:
        """Load a stream; gives the source behind it."""
        source = StreamSource(io.BytesIO(data))
        self.loader().load(source)
        return source


def filled_machine() -> ToyMachine:
    """A machine of which nothing is as at reset."""
    pages = {"toy.ram": b"\1" * PAGE + bytes(PAGE) + b"\2" * PAGE, "toy.vram": b"\7" * PAGE}
    machine = ToyMachine(run_state="running", pages=pages)
    channels = [SimpleNamespace(mode=1, count=2), SimpleNamespace(mode=3, count=4)]
    vars(machine.timer).update(
        vars(timer(now_ns=5, control=6, channels=channels, latched=True, name=b"tick", overrun=9))
    )
    machine.notes.text = b"remember"
    return machine


def empty_machine() -> ToyMachine:
    """As :func:`filled_machine`, at reset."""
    return ToyMachine(
        run_state="inmigrate", pages={"toy.ram": bytes(3 * PAGE), "toy.vram": bytes(PAGE)}
    )
