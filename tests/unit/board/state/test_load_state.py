"""Loading a machine: what it takes from a stream, what it refuses, and where it stops."""

from __future__ import annotations

import io
import socket
from struct import pack

import pytest

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.description import DESCRIPTION_LIMIT_BYTES
from stillframe.vmstate.devices import make_section, section_footer
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import CommandCode
from tests.unit.board.state.toys import (
    MACHINE,
    PAGE,
    ToyMachine,
    empty_machine,
    filled_machine,
    timer,
)

HEAD = writer.stream_header() + writer.configuration_section(MACHINE)
TIMER_V1 = pack(">QB4s", 1, 2, b"old!")
TIMER_V3 = pack(">QB10sB4s", 1, 2, bytes(10), 1, b"new!")


def full(idstr: str, payload: bytes, *, version: int = 1, instance: int = 0, sid: int = 9) -> bytes:
    return make_section(
        section_id=sid, idstr=idstr, instance_id=instance, version_id=version, payload=payload
    ).raw


def ram_start(blocks: list[tuple[str, int]] | None = None, sid: int = 5) -> bytes:
    return writer.ram_start_section(blocks or [("toy.ram", 2 * PAGE)], section_id=sid)


def command(code: int, data: bytes = b"") -> bytes:
    return b"\x08" + pack(">HH", code, len(data)) + data


def load(data: bytes) -> tuple[ToyMachine, StreamSource]:
    machine = ToyMachine()
    return machine, machine.load(HEAD + data)


def test_whole_machine_comes_back() -> None:
    saved, loaded = filled_machine(), empty_machine()
    source = loaded.load(saved.stream())
    assert source.peek() is None
    assert loaded.ram.blocks == saved.ram.blocks
    assert loaded.timer == saved.timer
    assert loaded.notes.text == saved.notes.text
    assert loaded.run_state.run_state == "running"


def test_older_device_loads() -> None:
    machine, _ = load(full("toy/timer", TIMER_V1, version=1) + b"\0")
    assert machine.timer == timer(now_ns=1, control=2, name=b"old!")


def test_ids_of_the_stream_are_its_own() -> None:
    """Sections are found by name; the stream's ids only tie parts to their start."""
    page = writer.ram_page_record(PAGE, b"\5" * PAGE, block="toy.ram")
    machine, _ = load(
        ram_start(sid=77)
        + full("toy/timer", TIMER_V3, version=3, sid=2)
        + writer.ram_part_prefix(77)
        + page
        + writer.ram_part_suffix(77)
        + writer.ram_end_section(77)
        + b"\0"
    )
    assert machine.ram.blocks["toy.ram"] == bytes(PAGE) + b"\5" * PAGE
    assert machine.timer.name == b"new!"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (full("toy/clock", b""), "unknown section 'toy/clock', instance 0"),
        (full("toy/timer", b"", instance=1), "unknown section 'toy/timer', instance 1"),
        (
            full("toy/timer", TIMER_V3, version=4),
            "section 'toy/timer' has version 4, this machine knows up to 3",
        ),
        (
            full("toy/timer", TIMER_V1, version=0),
            "'timer' of device 'toy/timer' has version 0, this machine needs at least 1",
        ),
        (
            full("toy/timer", TIMER_V3 + b"\x05\x07timer/x\0\0\0\1", version=3),
            "device 'toy/timer' has an unknown subsection 'timer/x'",
        ),
        (
            full("toy/timer", TIMER_V3 + b"x", version=3),
            "section 'toy/timer' does not end where its state does",
        ),
        (full("toy/timer", TIMER_V3, version=3)[:-4] + b"\0\0\0\1", "has id 1 and not 9"),
        (full("toy/timer", TIMER_V3, version=3) * 2, "section 'toy/timer', .* comes twice"),
        (full("ram", b"", version=4), "section 'ram' came as FULL"),
        (
            b"\x01" + full("toy/timer", TIMER_V3, version=3)[1:],
            "section 'toy/timer' came as START",
        ),
        (ram_start() * 2, "section 'ram', .* comes twice"),
        (ram_start() + full("notes", b"\0", instance=5, sid=5), "'notes', .* comes twice"),
        (writer.ram_end_section(5), "a part of section 5 comes without its start"),
        (
            full("toy/timer", TIMER_V3, version=3) + writer.ram_end_section(9),
            "a part of section 9 comes without its start",
        ),
        (full("globalstate", b"\0\0\0\7galore".ljust(104, b"\0")), "unknown run state 'galore'"),
        (b"\x09", "unknown section type 0x09"),
        (b"\x07", "unknown section type 0x07"),
        (b"\x7e", "unknown section type 0x7e"),
        (b"", "truncated in a section's header"),
        (full("toy/timer", TIMER_V3, version=3), "truncated in a section's header"),
        (
            full("toy/timer", TIMER_V3, version=3)[:-5],
            "truncated in the footer of section 'toy/timer'",
        ),
        (
            full("toy/timer", TIMER_V3, version=3)[:-6],
            "truncated in field 'name' of device 'toy/timer'",
        ),
        (
            full("toy/timer", TIMER_V3, version=3)[:-10],
            r"truncated in field 'latched' of device 'toy/timer'",
        ),
        (
            full("toy/timer", TIMER_V3, version=3)[:-11],
            r"truncated in field 'channels\[1\].count' of device 'toy/timer'",
        ),
        (b"\x04\0\0\0\1\3a", "truncated in a section's name"),
        (b"\0\x06\xff\xff\xff\xff", f"the vmdescription has {(1 << 32) - 1} bytes"),
        (
            b"\0\x06" + pack(">I", DESCRIPTION_LIMIT_BYTES + 1),
            "the vmdescription has",
        ),
        (b"\0\x06\0\0\0\3{}", "truncated in the vmdescription"),
        (command(99), "unknown command 99"),
        (command(CommandCode.PING, b"\0"), "command PING has 1 bytes of data"),
        (command(CommandCode.PACKAGED, b"\0\0\0\1"), "the stream uses command PACKAGED"),
    ],
)
def test_refused(data: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        load(data)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"", "truncated in the stream's header"),
        (b"QEVM\0\0\0\2", "version 2, only version 3 is known"),
        (writer.stream_header() + b"\0", "no configuration section"),
        (
            writer.stream_header() + writer.configuration_section("pc-q35-7.2"),
            f"the stream is of a machine 'pc-q35-7.2', this one is a '{MACHINE}'",
        ),
        (
            writer.stream_header() + writer.configuration_section(MACHINE[:-1]),
            "the stream is of a machine 'toy-board-'",
        ),
        (
            HEAD + b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0fx-ignore-shared",
            "the stream depends on capability 'x-ignore-shared'",
        ),
        (
            HEAD + b"\x05\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0e",
            "the stream has pages of 16384 bytes, this machine of 4096",
        ),
    ],
)
def test_other_machines_are_refused(head: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        ToyMachine().load(head + b"\0")


def test_same_page_size_may_be_told() -> None:
    bits = b"\x05\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0c"
    assert ToyMachine().load(HEAD + bits + b"\0").peek() is None


def test_informing_commands_are_passed_over() -> None:
    _, source = load(command(CommandCode.PING, bytes(4)) + command(11) + b"\0")
    assert source.peek() is None


@pytest.mark.parametrize("description", [b"", writer.vmdescription({"devices": []})])
def test_what_follows_is_left(description: bytes) -> None:
    _, source = load(b"\0" + description + b"next")
    assert source.rest(100, "the rest") == b"next"


def test_commands_come_with_the_source_behind_them() -> None:
    machine = ToyMachine()
    seen: list[tuple[int, bytes]] = []

    def on_command(code: int, data: bytes, source: StreamSource) -> None:
        seen.append((code, data))
        if code == CommandCode.PING:
            assert source.take(3, "what the callback wants") == b"abc"

    loader = machine.loader(on_command)
    data = HEAD + command(CommandCode.PING, b"ping") + b"abc" + command(6, b"anything") + b"\0"
    assert loader.load(StreamSource(io.BytesIO(data))) is False
    assert seen == [(CommandCode.PING, b"ping"), (CommandCode.POSTCOPY_RAM_DISCARD, b"anything")]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (command(99), "unknown command 99"),
        (command(CommandCode.POSTCOPY_RUN, b"\0"), "command POSTCOPY_RUN has 1 bytes of data"),
        (command(CommandCode.PACKAGED), "command PACKAGED has 0 bytes of data"),
        (b"\x08\0\6\xff\xff", "truncated in command POSTCOPY_RAM_DISCARD"),
    ],
)
def test_malformed_commands_do_not_reach_the_callback(bad: bytes, what: str) -> None:
    loader = ToyMachine().loader(lambda *_: pytest.fail("called"))
    with pytest.raises(DataError, match=what):
        loader.load(StreamSource(io.BytesIO(HEAD + bad)))


def test_postcopy_order() -> None:
    """LISTEN, devices and RUN in a package; then the stream goes on, and the loop is taken up."""
    machine = ToyMachine()
    order: list[str] = []

    def on_command(code: int, data: bytes, source: StreamSource) -> bool | None:
        order.append(CommandCode(code).name)
        if code == CommandCode.PACKAGED:
            nested = source.take(int.from_bytes(data, "big"), "the package")
            return loader.load_sections(StreamSource(io.BytesIO(nested)))
        return code == CommandCode.POSTCOPY_RUN

    loader = machine.loader(on_command)
    package = (
        command(CommandCode.POSTCOPY_LISTEN)
        + full("toy/timer", TIMER_V3, version=3)
        + command(CommandCode.POSTCOPY_RUN)
    )
    page = writer.ram_page_record(0, b"\5" * PAGE, block="toy.ram")
    data = (
        HEAD
        + ram_start(sid=5)
        + command(CommandCode.PACKAGED, pack(">I", len(package)))
        + package
        + writer.ram_part_prefix(5)
        + page
        + writer.ram_part_suffix(5)
        + writer.ram_end_section(5)
        + b"\0"
    )
    source = StreamSource(io.BytesIO(data))
    assert loader.load(source) is True
    assert order == ["PACKAGED", "POSTCOPY_LISTEN", "POSTCOPY_RUN"]
    assert machine.timer.name == b"new!"
    assert machine.ram.blocks["toy.ram"][0] == 0
    assert loader.load_sections(source) is False
    assert machine.ram.blocks["toy.ram"][0] == 5
    assert source.peek() is None


def test_a_device_comes_once_in_stream_and_package() -> None:
    machine = ToyMachine()
    section = full("toy/timer", TIMER_V3, version=3)
    loader = machine.loader(
        lambda code, data, source: loader.load_sections(StreamSource(io.BytesIO(section + b"\0")))
    )
    data = HEAD + section + command(CommandCode.PACKAGED, bytes(4)) + b"\0"
    with pytest.raises(DataError, match="comes twice"):
        loader.load(StreamSource(io.BytesIO(data)))


class SocketFile:
    """A live channel: gives what is there; waiting longer than a moment is a failure."""

    def __init__(self, channel: socket.socket) -> None:
        channel.settimeout(60)
        self._channel = channel

    def read(self, size: int) -> bytes:
        return self._channel.recv(size)


def test_live_stream_is_not_read_beyond_its_end() -> None:
    """The writer keeps the channel open and waits: nothing more than was sent may be needed."""
    near, far = socket.socketpair()
    with near, far:
        near.sendall(filled_machine().stream())
        machine = empty_machine()
        source = StreamSource(SocketFile(far), live=True)
        machine.loader().load(source)
        assert machine.notes.text == b"remember"
        near.sendall(b"hello")
        assert source.take(5, "what follows") == b"hello"


def test_postcopy_end_needs_no_more_than_eof() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(full("toy/timer", TIMER_V3, version=3) + b"\0")
        machine = ToyMachine()
        source = StreamSource(SocketFile(far), live=True)
        assert machine.loader().load_sections(source) is False
        assert source.available == 0


def test_footers_are_required() -> None:
    section = full("toy/timer", TIMER_V3, version=3)
    bare = section[: -len(section_footer(9))]
    with pytest.raises(DataError, match="found 0x04 in place of its footer"):
        load(bare + full("notes", b"\0", instance=5, sid=10) + b"\0")
