"""Saving a machine: which sections come, in which order, framed how."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.board.state.fields import StateDescription, u8
from stillframe.board.state.handlers import Output, SaveStateHandler, SaveStateRegistry
from stillframe.board.state.save_state import StateSaver
from tests.support.analyze_reader import Analysis
from tests.support.stream_summary import verify_stream
from tests.unit.board.state.toys import MACHINE, filled_machine


class Scripted(SaveStateHandler):
    """Writes a letter of its own for each step, and fails where it is told to."""

    def __init__(self, letter: str, **script: Any) -> None:
        self._letter = letter
        self._script = script

    @property
    def iterable(self) -> bool:
        return bool(self._script.get("iterable", True))

    def is_active(self) -> bool:
        return bool(self._script.get("active", True))

    def has_postcopy(self) -> bool:
        return bool(self._script.get("postcopy", False))

    def _write(self, out: Output, step: str) -> None:
        out.write(f"<{self._letter}:{step}>".encode())
        if self._script.get("fails") == step:
            raise OSError(f"no {step}")

    def setup(self, out: Output) -> None:
        self._write(out, "setup")

    def iterate(self, out: Output) -> bool:
        self._write(out, "iterate")
        return bool(self._script.get("done", True))

    def complete_precopy(self, out: Output) -> None:
        self._write(out, "precopy")

    def complete_postcopy(self, out: Output) -> None:
        self._write(out, "postcopy")

    def save(self, out: Output) -> None:
        self._write(out, "save")

    def cleanup(self) -> None:
        if self._script.get("fails") == "cleanup":
            raise OSError(f"{self._letter} no cleanup")


class Scene:
    def __init__(self, **handlers: Scripted) -> None:
        registry = SaveStateRegistry()
        for name, handler in handlers.items():
            registry.register(name, handler, version_id=1)
        self.out = io.BytesIO()
        self.log: list[str] = []
        self.saver = StateSaver(
            registry, machine_type=MACHINE, inactivate_disks=lambda: self.log.append("disks")
        )

    @property
    def steps(self) -> list[str]:
        """What was written, in order, without the frames."""
        return [p.split(b">")[0].decode() for p in self.out.getvalue().split(b"<")[1:]]


def scene(**more: Any) -> Scene:
    return Scene(
        d=Scripted("d", iterable=False),
        r=Scripted("r", postcopy=True, **more),
        s=Scripted("s"),
        idle=Scripted("idle", active=False),
        gone=Scripted("gone", iterable=False, active=False),
    )


def test_header() -> None:
    there = scene()
    there.saver.header(there.out)
    assert there.out.getvalue() == b"QEVM\0\0\0\3\x07\0\0\0\x0b" + MACHINE.encode()


def test_frames() -> None:
    there = Scene(x=Scripted("x", iterable=False), r=Scripted("r"))
    there.saver.setup(there.out)
    there.saver.iterate(there.out)
    there.saver.complete_precopy(there.out, iterable_only=True, inactivate_disks=False)
    there.saver.save_all_device_states(there.out, inactivate_disks=False, send_eof=False)
    assert there.out.getvalue() == (
        b"\x01\0\0\0\3\x01r\0\0\0\0\0\0\0\1<r:setup>\x7e\0\0\0\3"
        b"\x02\0\0\0\3<r:iterate>\x7e\0\0\0\3"
        b"\x03\0\0\0\3<r:precopy>\x7e\0\0\0\3"
        b"\x04\0\0\0\2\x01x\0\0\0\0\0\0\0\1<x:save>\x7e\0\0\0\2"
    )


def test_setup_is_for_active_iterable_handlers() -> None:
    there = scene()
    there.saver.setup(there.out)
    assert there.steps == ["r:setup", "s:setup"]


@pytest.mark.parametrize(
    ("done", "in_postcopy", "steps", "all_done"),
    [
        (True, False, ["r:iterate", "s:iterate"], True),
        (False, False, ["r:iterate"], False),
        (True, True, ["r:iterate"], True),
        (False, True, ["r:iterate"], False),
    ],
)
def test_iterate(done: bool, in_postcopy: bool, steps: list[str], all_done: bool) -> None:
    there = scene(done=done)
    assert there.saver.iterate(there.out, in_postcopy=in_postcopy) is all_done
    assert there.steps == steps


@pytest.mark.parametrize(
    ("iterable_only", "in_postcopy", "steps"),
    [
        (True, False, ["r:precopy", "s:precopy"]),
        (False, False, ["r:precopy", "s:precopy", "d:save"]),
        (True, True, ["s:precopy"]),
        (False, True, ["d:save"]),
    ],
)
def test_complete_precopy(iterable_only: bool, in_postcopy: bool, steps: list[str]) -> None:
    there = scene()
    there.saver.complete_precopy(
        there.out, iterable_only=iterable_only, inactivate_disks=True, in_postcopy=in_postcopy
    )
    assert there.steps == steps
    assert there.log == ([] if iterable_only else ["disks"])
    ends = there.out.getvalue().endswith(b"}")
    assert ends == (not iterable_only and not in_postcopy)


def test_complete_postcopy() -> None:
    there = scene()
    there.saver.complete_postcopy(there.out)
    assert there.steps == ["r:postcopy"]
    assert there.out.getvalue().endswith(b"\x7e\0\0\0\3\0")


def test_disks_are_given_up_before_eof() -> None:
    """As in QEMU: who has read EOF may open them."""
    there = scene()
    seen: list[bytes] = []
    there.saver._inactivate_disks = lambda: seen.append(there.out.getvalue())
    there.saver.save_all_device_states(there.out, inactivate_disks=True, send_eof=True)
    (before,) = seen
    assert before.endswith(b"\x7e\0\0\0\2")
    assert there.out.getvalue().startswith(before + b"\0\x06")


@pytest.mark.parametrize("send_eof", [False, True])
def test_disks_stay(send_eof: bool) -> None:
    there = scene()
    there.saver.save_all_device_states(there.out, inactivate_disks=False, send_eof=send_eof)
    assert there.log == []


@pytest.mark.parametrize("step", ["setup", "iterate", "precopy", "postcopy", "save"])
def test_no_footer_after_an_error(step: str) -> None:
    there = Scene(x=Scripted("x", iterable=step != "save", postcopy=True, fails=step))
    calls = {
        "setup": lambda: there.saver.setup(there.out),
        "iterate": lambda: there.saver.iterate(there.out),
        "precopy": lambda: there.saver.complete_precopy(
            there.out, iterable_only=True, inactivate_disks=True
        ),
        "postcopy": lambda: there.saver.complete_postcopy(there.out),
        "save": lambda: there.saver.save_all_device_states(
            there.out, inactivate_disks=True, send_eof=True
        ),
    }
    with pytest.raises(OSError, match=f"no {step}"):
        calls[step]()
    assert there.out.getvalue().endswith(f"<x:{step}>".encode())
    assert there.log == []


def test_cleanup_reaches_all_and_never_raises() -> None:
    there = Scene(
        a=Scripted("a", fails="cleanup"), b=Scripted("b"), c=Scripted("c", fails="cleanup")
    )
    assert [str(e) for e in there.saver.cleanup()] == ["a no cleanup", "c no cleanup"]


def test_whole_stream() -> None:
    machine = filled_machine()
    data = machine.stream()
    assert machine.ram.calls == ["setup", "iterate", "complete_precopy", "cleanup"]
    assert machine.notes.cleaned == 1
    assert machine.inactivated == 1
    summary = verify_stream(io.BytesIO(data))
    assert summary.devices == ("toy/timer", "notes", "globalstate")
    assert summary.machine_type == MACHINE
    assert summary.description_sizes_agree is True
    assert {b.idstr: (b.data_pages, b.zero_pages) for b in summary.blocks} == {
        "toy.ram": (2, 1),
        "toy.vram": (1, 0),
    }
    analysis = Analysis(data)
    assert analysis.configuration == MACHINE
    assert analysis.state["notes (4)"] == {"data": b"\x08remember".hex()}
    assert analysis.state["toy/timer (3)"] == {
        "now_ns": 5,
        "control": 6,
        "channels": [{"mode": 1, "count": 2}, {"mode": 3, "count": 4}],
        "latched": True,
        "name": b"tick".hex(),
        "timer/overrun": {"overrun": 9},
    }


def test_description() -> None:
    machine = filled_machine()
    text = machine.stream().rpartition(b"\0")[2]
    described = json.loads(text[text.index(b"{") :])
    assert list(described) == ["configuration", "page_size", "devices"]
    assert described["page_size"] == 4096
    assert described["configuration"] == {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": len(MACHINE)},
        ],
    }
    timer, notes, globalstate = described["devices"]
    assert list(timer)[:4] == ["name", "instance_id", "vmsd_name", "version"]
    assert (timer["name"], timer["vmsd_name"], timer["version"]) == ("toy/timer", "timer", 3)
    assert notes == {
        "name": "notes",
        "instance_id": 5,
        "size": 9,
        "fields": [{"name": "data", "size": 9, "type": "buffer"}],
    }
    assert [(f["name"], f["type"], f["size"]) for f in globalstate["fields"]] == [
        ("size", "uint32", 4),
        ("runstate", "buffer", 32),
        ("has_vm_was_suspended", "bool", 1),
        ("vm_was_suspended", "bool", 1),
        ("unused", "unused_buffer", 66),
    ]


def test_devices_that_need_no_section_have_none() -> None:
    """QEMU's rule for a description's own ``needed``."""
    registry = SaveStateRegistry()
    device = SimpleNamespace(n=0)
    description = StateDescription("dev", 1, 1, (u8("n"),), needed=lambda d: d.n != 0)
    registry.register_device("dev", description, device)
    saver = StateSaver(registry, machine_type=MACHINE, inactivate_disks=lambda: None)
    for device.n, devices in ((0, ()), (1, ("dev",))):
        out = io.BytesIO()
        saver.header(out)
        saver.save_all_device_states(out, inactivate_disks=False, send_eof=True)
        summary = verify_stream(io.BytesIO(out.getvalue()))
        assert summary.devices == devices
        assert summary.description_sizes_agree is True
