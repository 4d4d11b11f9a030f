"""What QMP commands bring about: one suite for a board and for a real QEMU.

Their answers' form is compared in tests/integration/test_qmp_board_like_qemu.py.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.vmstate.devices import split_device_state
from tests.support.qmp_machines import RAM_BYTES, board_monitor, make_disk, qemu_monitor
from tests.support.raw_qmp import RawQmp
from tests.support.tiny_guest import IDLE

Event = tuple[str, Any]

STOPPED: Event = ("STOP", None)
RESUMED: Event = ("RESUME", None)
WAS_RESET: Event = ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
POWERED_DOWN: Event = ("POWERDOWN", None)
WAS_SHUT_DOWN: Event = ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})


@pytest.fixture
def board(tmp_path: Path) -> Iterator[str]:
    """A board's monitor."""
    with board_monitor(tmp_path, make_disk(tmp_path)) as path:
        yield path


@pytest.fixture(params=["board", pytest.param("qemu", marks=pytest.mark.qemu)])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RawQmp]:
    """A connected monitor of a machine in prelaunch."""
    disk = make_disk(tmp_path)
    start = board_monitor(tmp_path, disk) if request.param == "board" else qemu_monitor(disk)
    with start as path, RawQmp(path) as client:
        yield client


def test_run_states_and_events_through_a_life(machine: RawQmp) -> None:
    life: list[tuple[str, list[Event], str]] = [
        ("stop", [], "prelaunch"),
        ("system_reset", [WAS_RESET], "prelaunch"),
        ("cont", [RESUMED], "running"),
        ("cont", [], "running"),
        ("stop", [STOPPED], "paused"),
        ("stop", [], "paused"),
        ("system_reset", [WAS_RESET], "prelaunch"),
        ("cont", [RESUMED], "running"),
        ("system_reset", [WAS_RESET], "running"),
        ("system_powerdown", [POWERED_DOWN], "running"),
    ]
    for number, (command, events, state) in enumerate(life):
        assert machine.command(command) == {"return": {}}, number
        assert machine.heard(len(events)) == events, number
        assert machine.execute("query-status")["status"] == state, number
    machine.send(b'{"execute": "quit", "id": 1}')
    # In either order.
    said = sorted([machine.receive(), machine.receive()], key=lambda message: "event" in message)
    assert said[0] == {"return": {}, "id": 1}
    assert (said[1]["event"], said[1]["data"]) == WAS_SHUT_DOWN


def test_saving_device_state_of_a_running_machine(machine: RawQmp, tmp_path: Path) -> None:
    machine.execute("cont")
    machine.heard(1)
    machine.execute("xen-save-devices-state", {"filename": str(tmp_path / "state")})
    assert machine.heard(2) == [STOPPED, RESUMED]
    assert machine.execute("query-status")["status"] == "running"
    state = (tmp_path / "state").read_bytes()
    (stored,) = (one for one in split_device_state(state) if one.idstr == "globalstate")
    assert b"running\0" in stored.raw
    assert state[-1] == 0


def test_saving_device_state_of_a_stopped_machine(machine: RawQmp) -> None:
    """Into a descriptor, as our outside code has it."""
    machine.execute("cont")
    machine.execute("stop")
    machine.heard(2)
    memfd = os.memfd_create("state")
    write_only = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
    path = f"/dev/fdset/{machine.execute('add-fd', None, (write_only,))['fdset-id']}"
    os.close(write_only)
    for number in range(2):
        before = os.fstat(memfd).st_size
        machine.execute("xen-save-devices-state", {"filename": path, "live": False})
        state = os.pread(memfd, 1 << 24, before)
        # The descriptors of a set share their offset.
        assert state[:4] == b"QEVM", number
        assert "globalstate" in [section.idstr for section in split_device_state(state)]
    os.close(memfd)
    assert machine.heard() == []
    assert machine.execute("query-status")["status"] == "paused"
    machine.execute("cont")
    assert machine.heard(1) == [RESUMED]


def test_migrating_into_a_descriptor(machine: RawQmp) -> None:
    """Events, run states, and it runs again."""
    on = {"capability": "events", "state": True}
    machine.execute("migrate-set-capabilities", {"capabilities": [on]})
    assert on in machine.execute("query-migrate-capabilities")
    machine.execute("cont")
    machine.heard(1)
    memfd = os.memfd_create("stream")
    machine.execute("getfd", {"fdname": "stream"}, (memfd,))
    machine.execute("migrate", {"uri": "fd:stream"})
    events: list[Event] = []
    while ("MIGRATION", {"status": "completed"}) not in events:
        events += machine.heard(1)
    # Newer QEMUs tell "device" each time; of passes there may be more or fewer.
    assert [
        event
        for event in events
        if event[0] != "MIGRATION_PASS" and event != ("MIGRATION", {"status": "device"})
    ] == [
        ("MIGRATION", {"status": "setup"}),
        ("MIGRATION", {"status": "active"}),
        STOPPED,
        ("MIGRATION", {"status": "completed"}),
    ]
    # QEMU tells the end a little before it is.
    deadline_s = time.monotonic() + 60
    while (state := machine.execute("query-status")["status"]) != "postmigrate":
        assert state == "finish-migrate"
        assert time.monotonic() < deadline_s
    assert os.pread(memfd, 4, 0) == b"QEVM"
    os.close(memfd)
    machine.execute("cont")
    assert machine.heard(1) == [RESUMED]
    # The descriptor was given away.
    assert machine.error("migrate", {"uri": "fd:stream"})[0] == "GenericError"
    assert machine.execute("query-status")["status"] == "running"


def test_no_ram_comes_during_a_migration(machine: RawQmp) -> None:
    machine.execute("cont")
    machine.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": 64 << 20})
    dimm = {"driver": "pc-dimm", "id": "d0", "memdev": "m0"}
    never_read, pipe = os.pipe()
    machine.execute("migrate-set-parameters", {"max-bandwidth": 4096})
    machine.execute("getfd", {"fdname": "pipe"}, (pipe,))
    machine.execute("migrate", {"uri": "fd:pipe"})
    assert machine.error("device_add", dimm) == (
        "GenericError", "device_add not allowed while migrating",
    )  # fmt: skip
    machine.execute("migrate_cancel")
    os.close(never_read)
    os.close(pipe)
    deadline_s = time.monotonic() + 60
    while machine.execute("query-migrate")["status"] != "cancelled":
        assert time.monotonic() < deadline_s
    machine.execute("device_add", dimm)
    assert machine.execute("query-memory-size-summary")["plugged-memory"] == 64 << 20
    assert machine.execute("query-status")["status"] == "running"


@pytest.mark.parametrize(("start", "size"), [
    (0, RAM_BYTES), (RAM_BYTES - 5, 9), (1 << 40, 4096), (-1, 1), (0, 0),
])  # fmt: skip
def test_saving_guest_memory(machine: RawQmp, tmp_path: Path, start: int, size: int) -> None:
    """RAM, its end, and zeros where there is nothing."""
    path = tmp_path / "memory"
    machine.execute("pmemsave", {"val": start, "size": size, "filename": str(path)})
    data = path.read_bytes()
    assert len(data) == size
    assert start == 0 or not any(data)


@pytest.mark.parametrize(("arguments", "magic"), [
    ({}, b"P6\n"), ({"format": "ppm"}, b"P6\n"), ({"format": "png"}, b"\x89PNG\r\n\x1a\n"),
])  # fmt: skip
def test_screendumps(
    machine: RawQmp, tmp_path: Path, arguments: dict[str, object], magic: bytes
) -> None:
    path = tmp_path / "picture"
    machine.execute("screendump", {"filename": str(path)} | arguments)
    assert path.read_bytes().startswith(magic)


def test_files_by_descriptor(machine: RawQmp) -> None:
    memfd = os.memfd_create("picture")
    write_only = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
    added = machine.execute("add-fd", {"opaque": "ours"}, (write_only,))
    os.close(write_only)
    assert machine.execute("query-fdsets") == [
        {"fdset-id": added["fdset-id"], "fds": [{"fd": added["fd"], "opaque": "ours"}]}
    ]
    machine.execute("screendump", {"filename": f"/dev/fdset/{added['fdset-id']}"})
    assert os.pread(memfd, 3, 0) == b"P6\n"
    os.close(memfd)


# Of the board only


def test_guest_memory_is_for_our_user_only(board: str, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with RawQmp(board) as client:
            path = tmp_path / "memory"
            client.execute("pmemsave", {"val": 0x100000, "size": 3, "filename": str(path)})
            assert path.read_bytes() == IDLE
            client.execute("xen-save-devices-state", {"filename": str(tmp_path / "state")})
    finally:
        os.umask(old)
    for name in ("memory", "state", "qmp"):
        assert stat.S_IMODE((tmp_path / name).lstat().st_mode) == 0o600, name


@pytest.mark.parametrize("size", [-1, (1 << 40) + 1, 2**63 - 1])
def test_absurd_sizes_are_refused(board: str, tmp_path: Path, size: int) -> None:
    """A QEMU fills the disk."""
    with RawQmp(board) as client:
        arguments = {"val": 0, "size": size, "filename": str(tmp_path / "memory")}
        assert client.error("pmemsave", arguments)[1].startswith("Invalid addr")


def test_saving_a_stopped_board_with_live_gives_its_disk_up(board: str, tmp_path: Path) -> None:
    with RawQmp(board) as client:
        # Twice, of which QEMU 7.2 dies (block.c: bdrv_inactivate_recurse).
        for _ in range(2):
            client.execute("xen-save-devices-state", {"filename": str(tmp_path / "state")})
        client.execute("cont")
        assert client.heard(1) == [RESUMED]


def test_several_clients_while_one_stops_and_continues_it(board: str) -> None:
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with RawQmp(board) as other:
                for _ in range(50):
                    assert other.execute("query-status")["status"] in ("running", "paused")
        except BaseException as error:
            failures.append(error)
            raise

    with RawQmp(board) as client:
        client.execute("cont")
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            client.execute("stop")
            client.execute("cont")
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_quitting_while_another_client_saves_memory(board: str) -> None:
    with RawQmp(board) as saver, RawQmp(board) as client:
        saver.send(
            b'{"execute": "pmemsave", "arguments":'
            b' {"val": 0, "size": %d, "filename": "/dev/null"}}' % (1 << 36)
        )
        client.execute("quit")
        # The rest is not there any more.
        while "event" in (answer := saver.receive()):
            continue
        assert answer["error"]["class"] == "GenericError"


def test_a_full_disk(board: str) -> None:
    """A QEMU says nothing of it, if it is small enough for the C library's buffer."""
    with RawQmp(board) as client:
        for command, arguments in (
            ("pmemsave", {"val": 0, "size": 4096}), ("screendump", {}),
            ("xen-save-devices-state", {}),
        ):  # fmt: skip
            assert client.error(command, arguments | {"filename": "/dev/full"}) == (
                "GenericError", "An IO error has occurred: No space left on device",
            )  # fmt: skip
        client.execute("cont")
        assert client.heard(1) == [RESUMED]
