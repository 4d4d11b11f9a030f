"""Device state: cut into sections, patched, described."""

from __future__ import annotations

import time
from struct import pack

import pytest

from stillframe.errors import DataError, UsageError
from stillframe.vmstate import devices, footers, writer
from stillframe.vmstate.devices import DeviceSection, split_device_state
from tests.support.stream_build import device
from tests.support.stream_summary import run_state


def state(*sections: DeviceSection) -> bytes:
    return writer.stream_header() + b"".join(s.raw for s in sections) + writer.eof()


def globalstate(name: str = "running") -> DeviceSection:
    text = name.encode()
    return device(47, "globalstate", pack(">I", len(text) + 1) + text.ljust(100, b"\0"))


def test_make_section() -> None:
    section = devices.make_section(
        section_id=5, idstr="cpu", instance_id=1, version_id=12, payload=b"xyz"
    )
    assert section.raw == (
        bytes.fromhex("04 00000005 03") + b"cpu" + bytes.fromhex("00000001 0000000c") + b"xyz"
        + bytes.fromhex("7e 00000005")
    )  # fmt: skip


def test_split_gives_the_same_sections() -> None:
    sections = (device(0, "timer", b"t" * 24), device(4, "slirp"), device(9, "a/b", b"\x7e" * 50))
    assert split_device_state(state(*sections)) == sections


def test_split_of_nothing() -> None:
    assert split_device_state(state()) == ()


def test_payload_that_contains_its_own_footer() -> None:
    """Only the chain up to the end tells which footer is the right one."""
    own = bytes.fromhex("7e00000005")
    sections = (
        device(5, "a", b"x" + own + b"y" + own),
        device(6, "b", own + b"\x04" + own + b"\0"),
        device(7, "c", b"\x7e\0\0\0"),
    )
    assert split_device_state(state(*sections)) == sections


def test_payload_that_contains_whole_sections_with_ids_in_use() -> None:
    """A second reading with the same id twice is none."""
    inner = device(5, "inner", b"i").raw
    sections = (device(5, "outer", b"\x7e\0\0\0\x05" + inner[:-5] + b"pad"), device(6, "last"))
    assert split_device_state(state(*sections)) == sections


def test_planted_section_changes_no_byte() -> None:
    """A guest that plants a footer and a header can hide a section that we only pass on."""
    planted = b"\x7e\0\0\0\x05" + device(6, "planted").raw[:-5]
    real = (device(5, "a", planted), device(6, "b"), device(7, "c"))
    found = split_device_state(state(*real))
    assert b"".join(s.raw for s in found) == b"".join(s.raw for s in real)
    assert found[-1] == real[-1]


@pytest.mark.parametrize("idstr", ["globalstate", "cpu", "0000:00:04.0/virtio-mem-device-early"])
def test_planted_section_that_we_look_into_is_refused(idstr: str) -> None:
    planted = b"\x7e\0\0\0\x05" + device(6, idstr).raw[:-5]
    with pytest.raises(DataError, match="more than one way"):
        split_device_state(state(device(5, "a", planted), device(6, "b"), device(7, "c")))


def test_names_that_repeat() -> None:
    """QEMU up to 7.2 registers every user network as ``slirp``, instance 0."""
    sections = (device(4, "slirp", b"one"), device(5, "slirp", b"other"), device(6, "slirp"))
    assert split_device_state(state(*sections)) == sections


def test_fewest_repeated_names_win() -> None:
    """A planted section with the name of a real one does not hide that one."""
    planted = b"\x7e\0\0\0\x05" + device(6, "c").raw[:-5]
    sections = (device(5, "a", planted), device(6, "b"), device(7, "c"))
    assert split_device_state(state(*sections)) == sections


@pytest.mark.parametrize("version", [0, 0x10000, 20061112, 0x7FFFFFFF])
def test_any_version_of_qemu(version: int) -> None:
    section = devices.make_section(
        section_id=9, idstr="eeprom", instance_id=0, version_id=version, payload=b"e"
    )
    sections = (device(3, "timer"), section, device(10, "x"))
    assert split_device_state(state(*sections)) == sections


def without_footer(section: DeviceSection) -> DeviceSection:
    return devices.make_section(
        section_id=section.section_id,
        idstr=section.idstr,
        instance_id=section.instance_id,
        version_id=section.version_id,
        payload=section.payload,
        footer=False,
    )


def test_sections_without_footers() -> None:
    own = b"\x7e\0\0\0\x04"
    header = device(3, "planted").raw[:-5]
    sections = tuple(
        map(
            without_footer,
            (
                device(3, "timer", b"t" * 24),
                device(4, "slirp", own + header + b"\4"),
                globalstate(),
            ),
        )
    )
    found = split_device_state(state(*sections))
    assert found == sections
    assert not any(section.has_footer for section in found)
    assert run_state(found) == "running"
    assert not devices.with_run_state(found[-1], "paused").has_footer


def test_one_missing_footer_is_damage() -> None:
    """And not taken for a stream without footers."""
    sections = [device(3, "timer", b"t" * 24), device(4, "slirp", b"s"), device(5, "c")]
    for place in range(3):
        damaged = list(sections)
        damaged[place] = without_footer(damaged[place])
        with pytest.raises(DataError, match="does not end"):
            split_device_state(state(*damaged))


def test_footer_within_a_header_is_none() -> None:
    """The header's last bytes, instance 0x7e and version 5, look like the footer of section 5."""
    header = devices.make_section(
        section_id=5, idstr="a", instance_id=0x7E, version_id=5, payload=b""
    ).raw[:-5]
    with pytest.raises(DataError):
        split_device_state(writer.stream_header() + header + writer.eof())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"QEVM\0\0\0\3", "truncated"),
        (b"XEVM\0\0\0\3\0", "magic"),
        (b"QEVM\0\0\0\2\0", "version 2"),
        (b"QEVM\0\0\0\3\1", "EOF"),
        (b"QEVM\0\0\0\3\1\0", "no device section"),
    ],
)
def test_not_a_device_state(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        split_device_state(data)
    assert caught.value.offset_bytes is not None


def test_every_truncation_is_refused() -> None:
    data = state(device(1, "a", b"abc"), device(2, "b", b"\0" * 9))
    for size in range(len(data)):
        with pytest.raises(DataError):
            split_device_state(data[:size])


def test_damage_in_the_middle_names_the_section() -> None:
    good = state(device(1, "a", b"abc"), device(2, "bad", b"xyz"), device(3, "c"))
    with pytest.raises(DataError, match="'bad' does not end"):
        split_device_state(good.replace(b"\x7e\0\0\0\2", b"\x7e\0\0\0\x22"))


def test_hostile_state_takes_bounded_work() -> None:
    """Many places that could be the end of a section, in several shapes."""
    again = device(1, "a").raw
    link = b"".join(device(i % 7, f"n{i}").raw for i in range(60_000))
    for body in (again * 70_000, link, b"\x7e\0\0\0\1\x04\0\0\0\1\1a" * 90_000):
        began = time.process_time()
        with pytest.raises(DataError):
            split_device_state(writer.stream_header() + body + writer.eof())
        assert time.process_time() - began < 10


def test_the_same_section_again_and_again_is_one_payload() -> None:
    body = device(1, "a").raw * 1000
    (section,) = split_device_state(writer.stream_header() + body + writer.eof())
    assert section.raw == body


def test_many_ways_to_read_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footers, "STEP_LIMIT", 50)
    body = b"".join(device(i % 3, f"n{i % 5}").raw for i in range(200))
    with pytest.raises(DataError, match="too many ways"):
        split_device_state(writer.stream_header() + body + writer.eof())


def test_megabytes_are_split_in_no_time() -> None:
    sections = tuple(device(i, f"dev{i}", bytes(200_000)) for i in range(40))
    data = state(*sections)
    began = time.process_time()
    assert split_device_state(data) == sections
    assert time.process_time() - began < 2


def test_early_sections() -> None:
    assert devices.is_early(device(1, "0000:00:03.0/virtio-mem-device-early"))
    assert not devices.is_early(device(1, "0000:00:03.0/virtio-mem-device"))


def test_run_state() -> None:
    section = globalstate("running")
    assert len(section.payload) == devices.GLOBAL_STATE_BYTES
    assert run_state((device(1, "a"), section)) == "running"
    paused = devices.with_run_state(section, "paused")
    assert paused == globalstate("paused")
    assert devices.with_run_state(paused, "running") == section


def test_run_state_keeps_the_fields_after_the_name() -> None:
    payload = bytearray(globalstate("running").payload)
    payload[36:38] = b"\1\1"
    changed = devices.with_run_state(device(47, "globalstate", bytes(payload)), "paused")
    assert changed.payload[36:38] == b"\1\1"
    assert changed.payload[4:36] == b"paused".ljust(32, b"\0")


def test_run_state_refuses() -> None:
    with pytest.raises(DataError, match="not 104"):
        devices.with_run_state(device(1, "globalstate", b"short"), "paused")
    for size in (0, 101, 0xFFFFFFFF):
        with pytest.raises(DataError, match="state name"):
            devices.with_run_state(
                device(1, "globalstate", pack(">I", size) + bytes(100)), "paused"
            )
    with pytest.raises(DataError, match="malformed"):
        run_state((device(1, "globalstate", pack(">I", 3) + b"\0" * 100),))
    with pytest.raises(UsageError):
        devices.with_run_state(globalstate(), "x" * 32)
    with pytest.raises(DataError):
        devices.with_run_state(device(1, "cpu"), "paused")


def test_describe() -> None:
    assert devices.describe((device(3, "a/b", b"xyz", 2),), target_page_bytes=4096) == {
        "page_size": 4096,
        "devices": [
            {
                "name": "a/b",
                "instance_id": 2,
                "vmsd_name": "a/b",
                "version": 1,
                "fields": [{"name": "data", "type": "buffer", "size": 3}],
            }
        ],
    }
