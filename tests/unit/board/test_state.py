"""Every device's state survives save and load, whatever it is; what none can be is refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.board.hardware.block import BLOCK
from stillframe.board.hardware.board import Board
from stillframe.board.hardware.clock import CLOCK
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.hardware.engine import Engine
from stillframe.board.hardware.entropy import ENTROPY
from stillframe.board.hardware.framebuffer import FRAMEBUFFER
from stillframe.board.hardware.interrupts import INTERRUPT_LINES
from stillframe.board.hardware.layout import GDT_GPA
from stillframe.board.hardware.locks import LOCKS
from stillframe.board.hardware.power import POWER
from stillframe.board.hardware.registers import REGISTERS, Registers
from stillframe.board.hardware.timer import TIMER
from stillframe.board.hardware.uart import UART
from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.fields import StateDescription, load_state, save_state
from stillframe.errors import DataError
from stillframe.vmstate.source import StreamSource

VCPUS = 3
u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))


def numbers(element: st.SearchStrategy[int], count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(element, min_size=count, max_size=count)


def _timer(draw: st.DrawFn) -> dict[str, Any]:
    mode = draw(st.integers(0, 2))
    deadline = draw(st.integers(0, (1 << 63) - 1)) if mode else -1
    return {
        "mode": mode,
        "deadline_ns": deadline,
        "interval_ns": draw(u64),
        "vcpu": draw(st.integers(0, VCPUS - 1)),
        "expirations": draw(u32),
    }


def _uart(draw: st.DrawFn) -> dict[str, Any]:
    enabled = draw(st.booleans())
    places = 16 if enabled else 1
    return {
        "fcr": draw(st.integers(0, 3)) << 6 | 1 if enabled else 0,
        "received": bytearray(draw(st.binary(max_size=places))),
        "to_send": bytearray(draw(st.binary(max_size=places))),
        "divisor": draw(u16),
        "transmitted": draw(st.booleans()),
    } | {name: draw(u8) for name in ("ier", "lcr", "mcr", "errors", "msr", "scr")}


def _block(draw: st.DrawFn) -> dict[str, Any]:
    state = {
        "status": draw(st.integers(0, 3)),
        "command": 0,
        "done_sectors": draw(u32),
        "sector": draw(u64),
        "address": draw(u64),
        "count": draw(u32),
    }
    if state["status"] == 1:
        count = draw(st.integers(1, 2048))
        state |= {
            "command": draw(st.integers(1, 3)),
            "count": count,
            "done_sectors": draw(st.integers(0, count)),
            "sector": draw(st.integers(0, 4096 - count)),
            "address": draw(st.integers(0, (16 << 20) - count * 512)),
        }
    return state


DEVICES: dict[str, tuple[StateDescription, Callable[[st.DrawFn], dict[str, Any]]]] = {
    "interrupts": (
        INTERRUPT_LINES,
        lambda draw: {name: draw(u16) for name in ("enabled", "pending")},
    ),
    "clock": (
        CLOCK,
        lambda draw: {
            "stopped_ns": draw(st.integers(0, (1 << 62) - 1)),
            "latched_high": draw(numbers(u32, 8)),
        },
    ),
    "timer": (TIMER, _timer),
    "serial": (UART, _uart),
    "entropy": (
        ENTROPY,
        lambda draw: {"address": draw(u64), "next_gpa": draw(u64), "left_bytes": draw(u32)},
    ),
    "block": (BLOCK, _block),
    "locks": (
        LOCKS,
        lambda draw: {"held": draw(st.lists(st.booleans(), min_size=16, max_size=16))},
    ),
    "power": (
        POWER,
        lambda draw: {
            "button": draw(st.booleans()),
            "request": draw(st.integers(0, 4)),
            "status": draw(u8),
        },
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Board, Board]]:
    disk = tmp_path_factory.mktemp("state") / "disk"
    with disk.open("wb") as file:
        file.truncate(4096 * 512)
    config = BoardConfig(ram_bytes=16 << 20, vcpus=VCPUS, disk_path=str(disk))
    boards = Board(config), Board(config)
    yield boards
    for board in boards:
        board.close()


def devices_of(board: Board) -> dict[str, Any]:
    hardware = board.hardware
    return {
        "interrupts": hardware.vcpus[1].lines,
        "clock": hardware.clock,
        "timer": hardware.timer,
        "serial": hardware.uart,
        "entropy": hardware.entropy,
        "block": hardware.block,
        "locks": hardware.locks,
        "power": hardware.power,
    }


def test_every_registered_device_is_tested_here(pair: tuple[Board, Board]) -> None:
    registered = {entry.idstr for entry in pair[0].registry.entries}
    assert registered == {*DEVICES, "cpu", "framebuffer", "globalstate"}


@pytest.mark.parametrize("name", DEVICES)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_state_survives(name: str, pair: tuple[Board, Board], data: st.DataObject) -> None:
    description, choose = DEVICES[name]
    wanted = data.draw(st.composite(choose)())
    source, target = (devices_of(board)[name] for board in pair)
    for field, value in wanted.items():
        setattr(source, field, value)
    payload = save_state(description, source)
    reader = StreamSource(io.BytesIO(payload + b"rest"))
    load_state(description, target, reader, description.version_id)
    assert {field: getattr(target, field) for field in wanted} == wanted
    assert reader.take(4, "rest") == b"rest"
    assert save_state(description, target) == payload


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("interrupts", {"pending": 1 << 16}, "16 interrupt lines"),
    ("clock", {"stopped_ns": 1 << 62}, "cannot have run for"),
    ("timer", {"mode": 3}, "no mode 3"),
    ("timer", {"vcpu": VCPUS}, "vCPU 3"),
    ("timer", {"mode": 1, "deadline_ns": -1}, "deadline -1"),
    ("timer", {"mode": 0, "deadline_ns": 5}, "deadline 5"),
    ("timer", {"mode": 1, "deadline_ns": -2}, "deadline -2"),
    ("serial", {"fcr": 0, "received": bytearray(b"ab")}, "more than fits"),
    ("block", {"status": 4}, "no status 4"),
    ("block", {"status": 2, "command": 1}, "command 1 is under way"),
    ("block", {"status": 1, "command": 9, "count": 1}, "cannot execute command 9"),
    ("block", {"status": 1, "command": 1, "count": 5, "done_sectors": 6}, "cannot execute"),
    ("block", {"status": 1, "command": 1, "count": 5, "sector": 4095}, "the disk has 4096"),
    ("power", {"request": 5}, "no request 5"),
]


@pytest.mark.parametrize(("name", "state", "words"), IMPOSSIBLE)
def test_impossible_states_are_refused(
    pair: tuple[Board, Board], name: str, state: dict[str, Any], words: str
) -> None:
    description, _ = DEVICES[name]
    source, target = (devices_of(board)[name] for board in pair)
    before = dict(vars(source)), dict(vars(target))
    source.reset()
    for field, value in state.items():
        setattr(source, field, value)
    payload = save_state(description, source)
    vars(source).update(before[0])
    source.reset()
    try:
        with pytest.raises(DataError, match=words) as raised:
            load_state(description, target, StreamSource(io.BytesIO(payload)), 1)
        assert f"device '{name}'" in str(raised.value)
    finally:
        vars(target).update(before[1])
        target.reset()


def test_another_geometry_is_refused(pair: tuple[Board, Board]) -> None:
    source, target = (board.hardware.framebuffer for board in pair)
    source.width = 1
    payload = save_state(FRAMEBUFFER, source)
    source.width = target.width
    with pytest.raises(DataError, match=r"1x480 pixels, this board 640x480"):
        load_state(FRAMEBUFFER, target, StreamSource(io.BytesIO(payload)), 1)
    assert target.width == 640


@st.composite
def any_registers(draw: st.DrawFn) -> dict[str, Any]:
    """What a processor at privilege level 0 in long mode can hold, paging off."""
    tables = {
        name: {"selector": 0, "base": draw(u64), "limit": draw(u16), "flags": 0}
        for name in ("idt",)
    }
    flags = draw(u32) & 0x257FD5 | 2  # all but VM and its kin, which long mode has not
    return tables | {
        "regs": draw(numbers(u64, 16)),
        "eip": draw(u64),
        "eflags": flags,
        "fpuc": draw(u16) & 0x0F7F | 0x40,
        "fpus": draw(u16),
        "fptag": sum(3 << 2 * place for place in range(8) if draw(st.booleans())),
        "fpip": draw(u64),
        "fpdp": draw(u64),
        "fpcs": draw(u16),
        "fpds": draw(u16),
        "fpop": draw(u16),
        "fp_mantissas": [number | 1 << 63 for number in draw(numbers(u64, 8))],
        "fp_exponents": [number % 0x7FFE + 1 for number in draw(numbers(u16, 8))],
        "fs_base": draw(u64),
        "gs_base": draw(u64),
        "cr2": draw(u64),
        "cr3": draw(u64),
        "cr8": draw(st.integers(0, 15)),
        "mxcsr": draw(u16),
        "xmm": draw(numbers(u64, 32)),
        "lstar": draw(u64),
        "star": draw(u64),
        "cstar": draw(u64),
        "fmask": draw(u64),
        "kernelgsbase": draw(u64),
        "sysenter_cs": draw(u16),
        "sysenter_esp": draw(u64),
        "sysenter_eip": draw(u64),
        "tsc_aux": draw(u32),
        "misc_enable": draw(u64),
        "mtrr_default": draw(u64),
        "mtrr_variable": draw(numbers(u64, 16)),
        "mtrr_fixed": draw(numbers(u64, 11)),
        "halted": draw(st.integers(0, 1)),
        "exception": draw(st.integers(-1, 255)),
        "error_code": draw(u32),
    }


def contents(registers: Registers) -> dict[str, Any]:
    return {
        name: dict(vars(value)) if hasattr(value, "selector") else value
        for name, value in vars(registers).items()
        if not callable(value)
    }


class NoPorts:
    def port_in(self, port: int, size_bytes: int) -> int:
        return 0

    def port_out(self, port: int, size_bytes: int, value: int) -> None:
        return None


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With a descriptor table, from which segments are loaded."""
    ram = GuestRam("test.ram", 64 << 10)
    ram.write(GDT_GPA, struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
    engine = Engine(NoPorts())
    engine.map(0, ram)
    return engine


@settings(max_examples=150, deadline=None)
@given(wanted=any_registers())
def test_registers_survive_saving_loading_and_the_engine(
    engine: Engine, wanted: dict[str, Any]
) -> None:
    saved, loaded, read = Registers(), Registers(), Registers()
    for name, value in wanted.items():
        if isinstance(value, dict):
            vars(getattr(saved, name)).update(value)
        else:
            setattr(saved, name, value)
    payload = save_state(REGISTERS, saved)
    load_state(REGISTERS, loaded, StreamSource(io.BytesIO(payload)), 1)
    assert contents(loaded) == contents(saved)
    engine.write_registers(loaded)
    engine.read_registers(read)
    # These three the engine does not know.
    for name in ("halted", "exception", "error_code"):
        setattr(read, name, getattr(loaded, name))
    assert contents(read) == contents(loaded) | {"fptag": read.fptag}
    # It tells empty x87 registers from full ones; what is in a full one it tells anew.
    for place in range(0, 16, 2):
        assert (read.fptag >> place & 3 == 3) == (loaded.fptag >> place & 3 == 3)


def test_memory_types_are_saved_only_if_set_and_forgotten_where_they_are_not() -> None:
    plain, typed, loaded = Registers(), Registers(), Registers()
    typed.mtrr_fixed[3] = 6
    lengths = []
    for saved in (typed, plain):
        payload = save_state(REGISTERS, saved)
        lengths.append(len(payload))
        load_state(REGISTERS, loaded, StreamSource(io.BytesIO(payload)), 1)
        assert contents(loaded) == contents(saved)
    assert lengths[0] - lengths[1] > 8 * 29


@pytest.mark.parametrize(
    ("state", "words"),
    [({"halted": 2}, "halted is 2"), ({"exception": 256}, "no exception 256")],
)
def test_impossible_registers_are_refused(state: dict[str, int], words: str) -> None:
    registers = Registers()
    for name, value in state.items():
        setattr(registers, name, value)
    payload = save_state(REGISTERS, registers)
    with pytest.raises(DataError, match=words):
        load_state(REGISTERS, Registers(), StreamSource(io.BytesIO(payload)), 1)
