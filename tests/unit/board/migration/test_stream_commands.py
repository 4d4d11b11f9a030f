"""COMMAND records of live streams, byte for byte (QEMU ``migration/savevm.c``)."""

from __future__ import annotations

import pytest

from stillframe.board.migration import stream_commands as commands
from stillframe.errors import DataError
from stillframe.vmstate.wire import CommandCode

HEAD_BYTES = 5


def test_bytes() -> None:
    assert commands.command(CommandCode.OPEN_RETURN_PATH) == bytes.fromhex("08 0001 0000")
    assert commands.ping(3) == bytes.fromhex("08 0002 0004 00000003")
    assert commands.postcopy_advise() == bytes.fromhex(
        "08 0003 0010 0000000000001000 0000000000001000"
    )
    assert commands.packaged(b"abc") == bytes.fromhex("08 0007 0004 00000003") + b"abc"


def test_discards() -> None:
    runs = [(n * 3, 2) for n in range(13)]
    first, second = commands.ram_discard("ram", runs)
    assert first[:15] == bytes.fromhex("08 0006") + (6 + 12 * 16).to_bytes(2, "big") + (
        bytes.fromhex("00 03 72616d 00") + bytes(4)
    )
    assert commands.read_discard(first[HEAD_BYTES:]) == ("ram", runs[:12])
    assert commands.read_discard(second[HEAD_BYTES:]) == ("ram", runs[12:])
    assert list(commands.ram_discard("ram", [])) == []


@pytest.mark.parametrize(
    "data",
    [
        "",
        "00",
        "01 03 72616d 00",
        "00 03 72616d 01",
        "00 ff 72616d 00",
        "00 01 ff 00",
        "00 03 72616d 00 00",
        "00 03 72616d 00 0000000000000800 0000000000001000",
        "00 03 72616d 00 0000000000001000 0000000000000001",
    ],
)
def test_malformed_discards(data: str) -> None:
    with pytest.raises(DataError):
        commands.read_discard(bytes.fromhex(data))


def test_other_commands_that_are_malformed() -> None:
    with pytest.raises(DataError):
        commands.read_number(b"abc", "PING")
    with pytest.raises(DataError):
        commands.check_advise(b"")
    with pytest.raises(DataError):
        commands.check_advise(commands.postcopy_advise()[HEAD_BYTES:-1] + b"\1")
    with pytest.raises(DataError):
        commands.packaged(bytes(commands.MOST_PACKAGED_BYTES + 1))
