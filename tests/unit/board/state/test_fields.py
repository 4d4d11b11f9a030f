"""Declared state: its bytes, written out by hand after QEMU's rules, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from stillframe.board.state import fields
from stillframe.board.state.fields import (
    Field,
    StateDescription,
    array,
    boolean,
    buffer,
    describe_state,
    i32,
    i64,
    load_state,
    save_state,
    struct,
    struct_array,
    u8,
    u16,
    u32,
    u64,
    unused,
    variable_array,
    variable_buffer,
)
from stillframe.errors import DataError, InternalError, UsageError
from stillframe.vmstate.source import StreamSource


def state(*declared: Field, name: str = "dev", version: int = 1, **more: Any) -> StateDescription:
    return StateDescription(name, version, more.pop("oldest", 0), declared, **more)


def device(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def reload(
    description: StateDescription, data: bytes, into: Any, version: int | None = None
) -> StreamSource:
    source = StreamSource(io.BytesIO(data))
    load_state(description, into, source, description.version_id if version is None else version)
    return source


EVERY = state(
    u8("a"),
    u16("b"),
    u32("c"),
    u64("d"),
    i32("e"),
    i64("f"),
    boolean("g"),
    buffer("h", 3),
    array("i", u16, 2),
    unused(2),
    variable_buffer("j", "a", limit_bytes=4),
    variable_array("k", u8, "b", limit=4),
    struct("m", state(u8("x"), name="inner")),
    struct_array("n", state(u8("x"), name="inner"), 2),
)
EVERY_BYTES = bytes.fromhex(
    "02 0003 00000005 0000000000000006 ffffffff fffffffffffffffe 01 686868 0001ffff 0000 6a6a"
    "010203 07 08 09"
)


def every() -> SimpleNamespace:
    return device(
        a=2, b=3, c=5, d=6, e=-1, f=-2, g=True, h=b"hhh", i=(1, 0xFFFF), j=b"jj", k=[1, 2, 3],
        m=device(x=7), n=[device(x=8), device(x=9)],
    )  # fmt: skip


def test_every_kind() -> None:
    assert save_state(EVERY, every()) == EVERY_BYTES
    loaded = device(m=device(), n=[device(), device()], i=(0, 0))
    assert reload(EVERY, EVERY_BYTES, loaded).peek() is None
    assert loaded == every()
    assert loaded.g is True


def test_every_kind_is_described() -> None:
    inner = {
        "vmsd_name": "inner",
        "version": 1,
        "fields": [{"name": "x", "type": "uint8", "size": 1}],
    }
    assert describe_state(EVERY, every()) == {
        "vmsd_name": "dev",
        "version": 1,
        "fields": [
            {"name": "a", "type": "uint8", "size": 1},
            {"name": "b", "type": "uint16", "size": 2},
            {"name": "c", "type": "uint32", "size": 4},
            {"name": "d", "type": "uint64", "size": 8},
            {"name": "e", "type": "int32", "size": 4},
            {"name": "f", "type": "int64", "size": 8},
            {"name": "g", "type": "bool", "size": 1},
            {"name": "h", "type": "buffer", "size": 3},
            {"name": "i", "array_len": 2, "type": "uint16", "size": 2},
            {"name": "unused", "type": "unused_buffer", "size": 2},
            {"name": "j", "type": "buffer", "size": 2},
            {"name": "k", "array_len": 3, "type": "uint8", "size": 1},
            {"name": "m", "type": "struct", "struct": inner, "size": 1},
            {"name": "n", "array_len": 2, "type": "struct", "struct": inner, "size": 1},
        ],
    }


def test_descriptions_are_the_callers_own() -> None:
    described = describe_state(EVERY, every())
    described["fields"][0]["name"] = "changed"
    assert describe_state(EVERY, every())["fields"][0]["name"] == "a"


def test_mutable_values_are_filled_in_place() -> None:
    held, raw = [0, 0], bytearray(2)
    into = device(values=held, raw=raw)
    reload(state(array("values", u8, 2), buffer("raw", 2)), b"\1\2ab", into)
    assert held == [1, 2]
    assert raw == b"ab"
    assert into.values is held
    assert into.raw is raw


def test_missing_attributes_appear() -> None:
    into = device()
    reload(state(array("values", u8, 2), buffer("raw", 2), u8("n")), b"\1\2ab\3", into)
    assert into == device(values=[1, 2], raw=b"ab", n=3)


def test_older_versions_load_and_newer_fields_keep_their_values() -> None:
    description = state(
        u8("first"),
        u8("second", since=2),
        array("third", u8, 2, since=3),
        u8("fourth", exists=lambda d, version: version != 2),
        version=3,
        oldest=1,
    )
    for version, data in ((1, b"\1\4"), (2, b"\1\2"), (3, b"\1\2\3\3\4")):
        into = device(first=0, second=20, third=[30, 30], fourth=40)
        assert reload(description, data, into, version).peek() is None
        assert into == device(
            first=1,
            second=2 if version >= 2 else 20,
            third=[3, 3] if version >= 3 else [30, 30],
            fourth=40 if version == 2 else 4,
        )
    assert save_state(description, into) == b"\1\2\3\3\4"


@pytest.mark.parametrize(
    ("version", "what"),
    [
        (4, "device 'dev' has version 4, this machine knows up to 3"),
        (1, "device 'dev' has version 1, this machine needs at least 2"),
    ],
)
def test_other_versions_are_refused(version: int, what: str) -> None:
    with pytest.raises(DataError, match=what):
        reload(state(u8("a"), version=3, oldest=2), b"\0", device(), version)


def test_conditions_see_what_came_before() -> None:
    description = state(u8("kind"), u32("extra", exists=lambda d, version: d.kind == 1))
    assert save_state(description, device(kind=0, extra=9)) == b"\0"
    assert save_state(description, device(kind=1, extra=9)) == b"\1\0\0\0\x09"
    into = device(extra=7)
    assert reload(description, b"\0\1\1\1\1", into).available == 4
    assert into == device(kind=0, extra=7)


def test_steps_come_in_order() -> None:
    log: list[str] = []

    class Watched:
        _n = 1

        @property
        def n(self) -> int:
            log.append("get")
            return self._n

        @n.setter
        def n(self, value: int) -> None:
            log.append("set")
            self._n = value

    sub = state(
        u8("n"),
        name="dev/sub",
        pre_save=lambda d: log.append("sub pre_save"),
        post_load=lambda d, v: log.append(f"sub post_load {v}"),
    )
    description = state(
        u8("n"),
        subsections=(sub,),
        version=2,
        pre_save=lambda d: log.append("pre_save"),
        pre_load=lambda d: log.append("pre_load"),
        post_load=lambda d, v: log.append(f"post_load {v}"),
    )
    data = save_state(description, Watched())
    assert log == ["pre_save", "get", "sub pre_save", "get"]
    log.clear()
    reload(description, data, Watched(), 1)
    assert log == ["pre_load", "set", "set", "sub post_load 1", "post_load 1"]


def impossible(_: Any, version: int) -> None:
    raise ValueError("the FIFO's end is before its start")


def test_post_load_refuses() -> None:
    with pytest.raises(DataError) as caught:
        reload(state(u8("a"), post_load=impossible), b"\0", device())
    assert caught.value.what == "the state of device 'dev' is impossible (at byte 1)"
    assert caught.value.why == "the FIFO's end is before its start"


def test_setters_refuse() -> None:
    class Picky:
        @property
        def a(self) -> int:
            return 0

        @a.setter
        def a(self, value: int) -> None:
            raise ValueError(f"no {value} here")

    with pytest.raises(DataError, match="field 'a' of device 'dev' has an impossible value") as e:
        reload(state(u8("a")), b"\7", Picky())
    assert e.value.why == "no 7 here"


@pytest.mark.parametrize(
    ("description", "data", "what"),
    [
        (state(u8("a"), u32("b")), b"\0\0\0", "truncated in field 'b' of device 'dev'"),
        (state(buffer("a", 3)), b"\0\0", "truncated in field 'a' of device 'dev'"),
        (state(array("a", u64, 3)), bytes(23), "truncated in field 'a' of device 'dev'"),
        (state(unused(3)), b"\0\0", "truncated in field 'unused' of device 'dev'"),
        (
            state(struct("s", state(u8("x"), u8("y"), name="inner"))),
            b"\0",
            "truncated in field 's.y' of device 'dev'",
        ),
        (
            state(struct_array("s", state(u8("x"), name="inner"), 2)),
            b"\0",
            r"truncated in field 's\[1\].x' of device 'dev'",
        ),
        (
            state(u32("n"), variable_buffer("a", "n", limit_bytes=4)),
            b"\0\0\0\5xxxxx",
            "field 'a' of device 'dev' is too long",
        ),
        (
            state(u32("n"), variable_array("a", u64, "n", limit=4)),
            b"\xff\xff\xff\xff",
            "field 'a' of device 'dev' is too long",
        ),
        (state(boolean("a")), b"\2", "field 'a' of device 'dev' is neither false nor true"),
        (state(array("a", boolean, 2)), b"\1\x80", "field 'a' of device 'dev' is neither"),
    ],
)
def test_damaged_state_is_refused(description: StateDescription, data: bytes, what: str) -> None:
    into = device(s=[device(), device()]) if "[1]" in what.replace("\\", "") else device(s=device())
    with pytest.raises(DataError, match=what):
        reload(description, data, into)


def test_hostile_length_takes_no_memory() -> None:
    """The limit is looked at before anything is read."""

    class Endless:
        asked = 0

        def read(self, size: int) -> bytes:
            self.asked += size
            return b"\xff\xff\xff\xff" if self.asked == size else bytes(size)

    source = Endless()
    with pytest.raises(DataError, match="too long"):
        load_state(
            state(u32("n"), variable_buffer("a", "n", limit_bytes=1 << 20)),
            device(),
            StreamSource(source),
            1,
        )
    assert source.asked <= 1 << 20


@pytest.mark.parametrize(
    ("description", "values", "what"),
    [
        (state(u8("a"), u8("b")), {"a": 1}, "field 'b' of device 'dev' cannot be saved"),
        (state(u8("a"), u8("b")), {"a": 1, "b": 256}, "field 'b' of"),
        (state(u8("a")), {"a": -1}, "field 'a' of"),
        (state(u8("a")), {"a": "x"}, "field 'a' of"),
        (state(i64("a")), {"a": 1 << 63}, "field 'a' of"),
        (state(buffer("a", 2)), {"a": b"x"}, "field 'a' of"),
        (state(buffer("a", 2)), {"a": 2}, "field 'a' of"),
        (state(array("a", u8, 2)), {"a": [1]}, "field 'a' of"),
        (state(array("a", u8, 2)), {"a": 5}, "field 'a' of"),
        (state(array("a", u8, 2)), {"a": [1, 300]}, "field 'a' of"),
        (state(array("a", u8, 2)), {}, "field 'a' of"),
        (
            state(u8("n"), variable_buffer("a", "n", limit_bytes=4)),
            {"n": 1, "a": b"xy"},
            "field 'a' of",
        ),
        (
            state(u8("n"), variable_buffer("a", "n", limit_bytes=4)),
            {"n": 5, "a": b"xxxxx"},
            "field 'a' of",
        ),
        (state(struct("s", state(u8("x"), name="in"))), {"s": device()}, r"field 's\.x' of"),
        (
            state(struct_array("s", state(u8("x"), name="in"), 2)),
            {"s": [device(x=1)]},
            "field 's' of",
        ),
    ],
)  # fmt: skip
def test_a_devices_bug_is_named(
    description: StateDescription, values: dict[str, Any], what: str
) -> None:
    with pytest.raises(InternalError, match=what):
        save_state(description, device(**values))


def test_missing_structures_are_a_bug() -> None:
    with pytest.raises(InternalError, match="has 1 structures, not 2"):
        reload(
            state(struct_array("s", state(u8("x"), name="in"), 2)), b"\0\0", device(s=[device()])
        )


NUMBER = state(u8("n"), name="inner")


@pytest.mark.parametrize(
    "declare",
    [
        lambda: state(u8("a"), name=""),
        lambda: state(u8("a"), name="é"),
        lambda: state(u8("a"), name="x" * 256),
        lambda: state(u8("a"), version=2, oldest=3),
        lambda: state(u8("a"), version=-1),
        lambda: state(u8("a"), version=1 << 31),
        lambda: state(u8("a", since=2)),
        lambda: state(u8("")),
        lambda: state(u8("a", since=-1)),
        lambda: state(buffer("a", 0)),
        lambda: state(buffer("a", fields.LENGTH_LIMIT_BYTES + 1)),
        lambda: state(unused(0)),
        lambda: state(array("a", u64, 0)),
        lambda: state(array("a", u64, fields.LENGTH_LIMIT_BYTES // 8 + 1)),
        lambda: state(array("a", lambda name: buffer(name, 2), 2)),
        lambda: state(struct_array("a", NUMBER, 0)),
        lambda: state(variable_buffer("a", "n", limit_bytes=1)),
        lambda: state(i32("n"), variable_buffer("a", "n", limit_bytes=1)),
        lambda: state(variable_array("a", u8, "n", limit=1), u8("n")),
        lambda: state(u8("n"), variable_array("a", u8, "n", limit=0)),
        lambda: state(subsections=(state(name="other/sub"),)),
        lambda: state(subsections=(state(name="dev"),)),
        lambda: state(subsections=(state(name="dev/a"), state(name="dev/a"))),
        lambda: state(struct("s", state(name="dev")), subsections=(state(name="dev/a"),)),
    ],
)
def test_contradictory_declarations_are_refused(declare: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        declare()


def test_arrays_under_a_condition_are_described_one_by_one() -> None:
    """As QEMU does, so that its analyze-migration.py finds the elements."""
    description = state(
        array("a", u8, 2, exists=lambda d, v: True),
        array("one", u8, 1),
        u8("n"),
        variable_array("none", u8, "n", limit=3),
        u8("b", exists=lambda d, v: True),
        u8("b", exists=lambda d, v: True),
    )
    described = describe_state(description, device(a=[1, 2], one=[3], n=0, none=[], b=4))
    assert described["fields"] == [
        {"name": "a", "index": 0, "type": "uint8", "size": 1},
        {"name": "a", "index": 1, "type": "uint8", "size": 1},
        {"name": "one", "type": "uint8", "size": 1},
        {"name": "n", "type": "uint8", "size": 1},
        {"name": "b[0]", "type": "uint8", "size": 1},
        {"name": "b[1]", "type": "uint8", "size": 1},
    ]
