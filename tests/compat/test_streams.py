"""Streams that real QEMUs wrote once: what is read from them must never change."""

from __future__ import annotations

import io
import json

import pytest

from stillframe.vmstate.devices import split_device_state
from stillframe.vmstate.reader import StreamReader
from tests.compat.record_streams import RECORDINGS, STREAMS, expectation, load
from tests.support.analyze_reader import Analysis
from tests.support.stream_build import PAGE, replay
from tests.support.stream_summary import verify_stream


def test_all_recordings_are_there() -> None:
    """A recording is never made by a test run."""
    assert {p.stem for p in STREAMS.glob("*.zst")} == set(RECORDINGS)
    assert {p.stem for p in STREAMS.glob("*.json")} == set(RECORDINGS)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_stream(name: str) -> None:
    stream = load(name)
    expected = json.loads((STREAMS / f"{name}.json").read_text())
    assert expected == {k: expected[k] for k in ("qemu", "arguments")} | expectation(stream)


@pytest.mark.parametrize("name", ["q35-precopy", "pc-background"])
def test_independent_reader_agrees(name: str) -> None:
    stream = load(name)
    analysis = Analysis(stream)
    summary = verify_stream(io.BytesIO(stream))
    assert analysis.ram == {b.idstr: b.used_length_bytes for b in summary.blocks}
    assert analysis.pages + analysis.zero == sum(b.pages for b in summary.blocks)
    assert len(analysis.state) == len(summary.devices)
    assert summary.description_sizes_agree is True


def test_memory_is_what_the_firmware_wrote() -> None:
    for name in ("q35-precopy", "pc-background", "q35-compress"):
        ram = replay(list(StreamReader(io.BytesIO(load(name))).events()))["pc.ram"]
        for number in range(0x10, 0x20):
            page = ram[number * PAGE : (number + 1) * PAGE]
            word = (number << 8).to_bytes(2, "little")
            assert page == word.ljust(0xFF0, b"\0") + word.ljust(16, b"\0")


def test_device_state() -> None:
    state = load("q35-devices")
    sections = split_device_state(state)
    assert [s.idstr for s in sections][-2:] == ["acpi_build", "globalstate"]
    assert state == state[:8] + b"".join(s.raw for s in sections) + b"\0"
