"""The writer's bytes against the format, written out by hand."""

from __future__ import annotations

import pytest

from stillframe.errors import UsageError
from stillframe.vmstate import writer
from tests.support.stream_build import PAGE, device


def test_header() -> None:
    assert writer.stream_header() == bytes.fromhex("5145564d00000003")


def test_configuration() -> None:
    assert writer.configuration_section("pc-q35-7.2") == (
        bytes.fromhex("070000000a") + b"pc-q35-7.2"
    )


@pytest.mark.parametrize("bad", ["", "pc-q35-7.2-machine", "x" * 256, "pc-é"])
def test_configuration_refuses(bad: str) -> None:
    with pytest.raises(UsageError):
        writer.configuration_section(bad)


def test_ram_start() -> None:
    expected = (
        bytes.fromhex("01 00000002 03") + b"ram" + bytes.fromhex("00000000 00000004")
        + bytes.fromhex("0000000000003004")
        + b"\x06pc.ram" + bytes.fromhex("0000000000002000")
        + b"\x01x" + bytes.fromhex("0000000000001000")
        + bytes.fromhex("0000000000000010 7e 00000002")
    )  # fmt: skip
    assert writer.ram_start_section([("pc.ram", 8192), ("x", 4096)], section_id=2) == expected


@pytest.mark.parametrize(
    "blocks",
    [
        [("a", 4096), ("a", 4096)],
        [("a", 0)],
        [("a", 4097)],
        [("", 4096)],
        [("x" * 256, 4096)],
        [("a", -4096)],
    ],
)
def test_ram_start_refuses_blocks(blocks: list[tuple[str, int]]) -> None:
    with pytest.raises(UsageError):
        writer.ram_start_section(blocks, section_id=2)


@pytest.mark.parametrize("section_id", [0, -1, 1 << 32])
def test_section_id_refused(section_id: int) -> None:
    with pytest.raises(UsageError):
        writer.ram_start_section([("a", 4096)], section_id=section_id)
    with pytest.raises(UsageError):
        writer.ram_part_prefix(section_id)


def test_parts() -> None:
    assert writer.ram_part_prefix(7) == bytes.fromhex("0200000007")
    assert writer.ram_part_suffix(7) == bytes.fromhex("0000000000000010 7e 00000007")
    assert writer.ram_end_section(7) == bytes.fromhex("0300000007 0000000000000010 7e 00000007")


def test_page_records() -> None:
    page = bytes(range(256)) * 16
    assert writer.ram_page_record(0, page, block="pc.ram") == (
        bytes.fromhex("0000000000000008") + b"\x06pc.ram" + page
    )
    assert writer.ram_page_record(PAGE, page, block=None) == (
        bytes.fromhex("0000000000001028") + page
    )
    assert (
        writer.ram_zero_record(1 << 40, block="r") == bytes.fromhex("0000010000000002 01") + b"r\0"
    )
    assert writer.ram_zero_record(PAGE, block=None) == bytes.fromhex("0000000000001022 00")


@pytest.mark.parametrize("offset", [1, 512, -4096, 1 << 64])
def test_page_record_refuses_offset(offset: int) -> None:
    with pytest.raises(UsageError):
        writer.ram_zero_record(offset, block=None)


def test_end_of_stream() -> None:
    assert writer.eof() == b"\0"
    text = b'{"page_size": 4096, "devices": [{"name": "a", "instance_id": 0}]}'
    assert (
        writer.vmdescription({"page_size": 4096, "devices": [{"name": "a", "instance_id": 0}]})
        == b"\x06" + len(text).to_bytes(4, "big") + text
    )


def test_choose_section_id() -> None:
    assert writer.choose_section_id([]) == 2
    assert writer.choose_section_id([device(0, "timer"), device(4, "a")]) == 2
    assert writer.choose_section_id([device(2, "timer"), device(47, "a")]) == 48
    assert writer.choose_section_id([device(2, "a"), device(0xFFFFFFFF, "b")]) == 1
