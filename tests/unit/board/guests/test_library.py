"""The guest library does on the board what ``board.h`` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.board.guests.running import RunningGuest

DISK_BYTES = 64 << 10
OPTIONS = "number=41 number=42 word=two end={end} status={status}"
CHECKED = (
    "barrier",
    "memory map",
    "memmove up",
    "memmove down",
    "memcpy and memset",
    "locks",
    "lock units",
    "wake",
    "timer",
    "one shot",
    "expirations",
    "entropy",
    "disk",
    "disk refuses",
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(DISK_BYTES))
    return path


@pytest.mark.parametrize("vcpus", [1, 3])
def test_everything(selftest_guest: Path, disk: Path, vcpus: int) -> None:
    options = OPTIONS.format(end="off", status=7)
    with RunningGuest(selftest_guest, options, vcpus=vcpus, disk=disk) as guest:
        guest.wait("name")
        lines = guest.console.lines()
        assert not [line for line in lines if line.startswith("WRONG")]
        assert set(CHECKED) <= {line.removeprefix("ok ") for line in lines}
        assert lines.count("ok this_cpu") == vcpus
        assert "print text c -7 4000000000 beef 18446744073709551615 fedcba9876543210 % 0" in lines
        assert "put_text 1234567890123" in lines
        assert "options 42 6 1 0 none" in lines
        assert f"board ram={16 << 20} vcpus={vcpus} width=64 height=48 sectors=128" in lines
        assert guest.picture()[20:24] == bytes.fromhex("56341200")
        # what does not fit into the guest's buffer is cut off
        assert guest.ask("abcdefghij", "^line") == "line 'abcdefg'"
        assert guest.exit_status() == 7
    assert disk.read_bytes()[3 * 512 :][:1024] == bytes(at * 7 & 0xFF for at in range(1024))


def test_return_of_board_main_powers_off(selftest_guest: Path, disk: Path) -> None:
    options = OPTIONS.format(end="return", status=7)
    with RunningGuest(selftest_guest, options, vcpus=2, disk=disk) as guest:
        guest.wait("name")
        guest.console.send("x")
        assert guest.exit_status() == 0


@pytest.mark.parametrize(
    ("end", "message"),
    [("panic", "^panic: as wished$"), ("exception", r"^exception 6 on vCPU 0: .* rip 0x10")],
)
def test_panic(selftest_guest: Path, disk: Path, end: str, message: str) -> None:
    options = OPTIONS.format(end=end, status=7)
    with RunningGuest(selftest_guest, options, disk=disk) as guest:
        guest.wait("name")
        guest.ask("x", message)
        guest.wait("^panic: ")
        guest.wait_for_event("GUEST_PANICKED")
        assert guest.board.run_state == "guest-panicked"
