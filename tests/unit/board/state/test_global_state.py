"""The run state's section: QEMU's 104 bytes."""

from __future__ import annotations

import io

import pytest

from stillframe.board.state.fields import load_state, save_state
from stillframe.board.state.global_state import GLOBAL_STATE, RUN_STATES, GlobalState
from stillframe.errors import DataError, UsageError
from stillframe.vmstate.devices import make_section, run_state
from stillframe.vmstate.source import StreamSource


def load(payload: bytes) -> GlobalState:
    state = GlobalState(lambda: "paused")
    load_state(GLOBAL_STATE, state, StreamSource(io.BytesIO(payload)), 1)
    return state


@pytest.mark.parametrize("name", sorted(RUN_STATES))
def test_round_trip(name: str) -> None:
    saved = GlobalState(lambda: name)
    payload = save_state(GLOBAL_STATE, saved)
    assert payload == (len(name) + 1).to_bytes(4, "big") + name.encode().ljust(100, b"\0")
    assert (saved.run_state, saved.received) == (name, False)
    loaded = load(payload)
    assert (loaded.run_state, loaded.received) == (name, True)
    section = make_section(
        section_id=2, idstr="globalstate", instance_id=0, version_id=1, payload=payload
    )
    assert run_state([section]) == name


def test_old_and_new_layouts_load() -> None:
    """QEMU up to 8.2 has a name of 100 bytes, 9.0 and later two bools behind 32."""
    new = b"\0\0\0\7paused".ljust(36, b"\0") + b"\1\1" + bytes(66)
    state = load(new)
    assert state.run_state == "paused"
    assert state.has_vm_was_suspended
    assert state.vm_was_suspended


def test_what_was_loaded_is_not_saved_again() -> None:
    state = load(b"\0\0\0\x08running".ljust(104, b"\0"))
    assert save_state(GLOBAL_STATE, state) == b"\0\0\0\7paused".ljust(104, b"\0")


@pytest.mark.parametrize(
    "payload",
    [
        b"\0\0\0\0",
        b"\0\0\0\1",
        b"\0\0\0\x07running",
        b"\0\0\0\x09running",
        b"\0\0\0\x08run\0ing",
        b"\0\0\0\x08runn\xffng",
        b"\0\0\0\x21running",
        b"\xff\xff\xff\xffrunning",
    ],
)
def test_malformed_states_are_refused(payload: bytes) -> None:
    with pytest.raises(DataError, match=r"globalstate.* malformed"):
        load(payload.ljust(104, b"\0"))


def test_unknown_states_are_refused() -> None:
    with pytest.raises(DataError, match=r"globalstate .* unknown run state 'runninx'"):
        load(b"\0\0\0\x08runninx".ljust(104, b"\0"))


def test_impossible_states_are_not_saved() -> None:
    with pytest.raises(UsageError):
        save_state(GLOBAL_STATE, GlobalState(lambda: "x" * 32))
