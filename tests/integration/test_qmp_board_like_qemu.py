"""Each QMP command of a board and of a real QEMU: the same names, types, errors and events.

What differs is listed here, and in docs/reference/board-qmp.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe.machine.board.config import BoardConfig
from stillframe.migration.host import start_host
from stillframe.vmstate.devices import split_device_state
from tests.support.bare_vm import BareVm
from tests.support.raw_qmp import RawQmp
from tests.support.reply_shape import differences
from tests.support.tiny_guest import IDLE, write_guest

pytestmark = pytest.mark.qemu

Pair = tuple[RawQmp, RawQmp]

RAM_MIB = 64
DISK_BYTES = 1 << 20

NOT_THERE = """
announce-initial announce-max announce-rounds announce-step block-incremental compress-level
compress-threads compress-wait-thread cpu-throttle-increment cpu-throttle-initial
cpu-throttle-tailslow decompress-threads max-cpu-throttle multifd-channels multifd-compression
multifd-zlib-level multifd-zstd-level throttle-trigger-threshold tls-authz tls-creds tls-hostname
x-checkpoint-delay xbzrle-cache-size
"""
"""Parameters of what the board does not have: compression, TLS, multifd, throttling, XBZRLE."""

DIFFERENT = {
    # QEMU drops it in 9.0.
    "missing query-status.singlestep",
    # Of a QEMU with NUMA nodes, which hot-plugging brings with it.
    "missing query-cpus-fast[].props.node-id",
    # QEMU tells it of its default machine only, and the first of its list is another.
    "more query-machines[].is-default",
    # The board has no models of processors to choose from.
    "missing query-machines[].default-cpu-type",
    *(f"missing query-migrate-parameters.{name}" for name in NOT_THERE.split()),
    # QEMU has it since 8.2.
    "more query-migrate-parameters.avail-switchover-bandwidth",
    # The statistics of our own snapshot job.
    "more query-migrate.x-stillframe",
}
"""All differences in the names and types of what commands return."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    path.write_bytes(bytes(DISK_BYTES))
    return path


def start_pair(disk: Path, directory: Path) -> Iterator[Pair]:
    """A QEMU and a board alike, both not started yet."""
    config = BoardConfig(
        name="vm",
        guest_path=write_guest(directory / "guest.elf"),
        ram_bytes=RAM_MIB << 20,
        vcpus=2,
        disk_path=str(disk),
    )
    with (
        start_host(config, qmp=str(directory / "qmp"), paused=True),
        BareVm(
            *("-machine", "q35", "-nodefaults", "-S", "-smp", "2"),
            *("-m", f"size={RAM_MIB}M,slots=1,maxmem=1G", "-device", "VGA"),
            *("-drive", f"file={disk},format=raw,if=none,id=disk0,file.locking=off"),
            *("-device", "virtio-blk-pci,drive=disk0"),
            name="vm",
        ) as vm,
        RawQmp(vm.qmp) as theirs,
        RawQmp(directory / "qmp") as ours,
    ):
        yield theirs, ours


@pytest.fixture(scope="module")
def unstarted(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For commands that leave things as they are."""
    yield from start_pair(disk, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(disk: Path, tmp_path: Path) -> Iterator[Pair]:
    yield from start_pair(disk, tmp_path)


def both(pair: Pair, name: str, arguments: object = None, fds: tuple[int, ...] = ()) -> Any:
    """What both answer."""
    return tuple(one.command(name, arguments, fds) for one in pair)


@pytest.mark.parametrize(("name", "arguments"), [
    ("query-version", None), ("query-status", None), ("query-commands", None),
    ("query-name", None), ("query-uuid", None), ("query-target", None), ("query-kvm", None),
    ("query-machines", None), ("query-cpus-fast", None), ("query-block", None),
    ("query-memdev", None), ("query-memory-size-summary", None), ("query-memory-devices", None),
    ("query-jobs", None), ("query-fdsets", None), ("x-query-ramblock", None),
    ("query-migrate", None), ("query-migrate-capabilities", None),
    ("query-migrate-parameters", None),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("qom-get", {"path": "/machine", "property": "peripheral"}),
    ("qom-get", {"path": "/machine/peripheral", "property": "type"}),
    ("qom-list", {"path": "/machine"}), ("qom-list", {"path": "/objects"}),
    ("qom-list", {"path": "/"}), ("qom-list", {"path": "/machine/peripheral-anon"}),
    *(
        ("human-monitor-command", {"command-line": line})
        for line in ("info ramblock", "info mtree -f", "info status", "gpa2hva 0x100000", "")
    ),
])  # fmt: skip
def test_queries_have_the_same_members(unstarted: Pair, name: str, arguments: object) -> None:
    theirs, ours = both(unstarted, name, arguments)
    assert set(theirs) == {"return"}
    assert differences(theirs["return"], ours["return"], name) <= DIFFERENT


def test_all_listed_differences_are_there(unstarted: Pair) -> None:
    found: set[str] = set()
    for name in (
        "query-status", "query-cpus-fast", "query-machines", "query-migrate-parameters",
    ):  # fmt: skip
        theirs, ours = both(unstarted, name)
        found |= differences(theirs["return"], ours["return"], name)
    assert found == DIFFERENT - {"more query-migrate.x-stillframe"}


def test_what_the_queries_say(unstarted: Pair) -> None:
    for name in (
        "query-name", "query-uuid", "query-target", "query-memory-size-summary",
        "query-memory-devices", "query-jobs", "query-fdsets",
    ):  # fmt: skip
        theirs, ours = both(unstarted, name)
        assert ours == theirs, name
    _, ours = unstarted
    assert ours.execute("query-status") == {"status": "prelaunch", "running": False}
    threads = {cpu["thread-id"] for cpu in ours.execute("query-cpus-fast")}
    assert threads <= {int(name) for name in os.listdir("/proc/self/task")}
    assert len(threads) == 2
    (theirs_disk,), (our_disk,) = (one.execute("query-block") for one in unstarted)
    for member in ("device", "removable", "locked", "type", "io-status"):
        assert our_disk[member] == theirs_disk[member]
    inserted = our_disk["inserted"] | {"node-name": "", "file": ""}
    assert inserted == theirs_disk["inserted"] | {"node-name": "", "file": ""}


def test_qemu_has_all_commands_of_the_board(unstarted: Pair) -> None:
    theirs, ours = (
        {command["name"] for command in one.execute("query-commands")} for one in unstarted
    )
    assert ours - theirs == set()


WRONG = [
    ("nosuch", None),
    ("query-status", {"x": 1}),
    ("stop", {"x": 1}),
    ("qom-get", {}),
    ("qom-get", {"path": "/machine"}),
    ("qom-get", {"path": 5, "property": "type"}),
    ("qom-get", {"path": "/nosuch", "property": "type"}),
    ("qom-list", {"path": "/nosuch"}),
    ("qom-list", {"path": "/machine", "x": None}),
    ("screendump", None),
    ("screendump", {"filename": 5}),
    ("screendump", {"filename": "x", "format": "gif"}),
    ("screendump", {"filename": "x", "format": None}),
    ("screendump", {"filename": "x", "device": "nosuch"}),
    ("screendump", {"filename": "x", "device": "nosuch", "head": 1}),
    ("screendump", {"filename": "x", "head": 1}),
    ("screendump", {"filename": "/nosuch/x"}),
    ("screendump", {"filename": "/dev/fdset/9"}),
    ("pmemsave", {"val": 0, "size": 1}),
    ("pmemsave", {"val": 1.5, "size": 1, "filename": "x"}),
    ("pmemsave", {"val": 0, "size": "1", "filename": "x"}),
    ("pmemsave", {"val": 2**64, "size": 1, "filename": "x"}),
    ("pmemsave", {"val": 0, "size": 1, "filename": "/nosuch/x"}),
    ("pmemsave", {"val": 0, "size": 1, "filename": "/dev/fdset/9"}),
    ("xen-save-devices-state", None),
    ("xen-save-devices-state", {"filename": "x", "live": 1}),
    ("xen-save-devices-state", {"filename": "/nosuch/x"}),
    ("xen-save-devices-state", {"filename": "/dev/fdset/9"}),
    ("xen-save-devices-state", {"filename": "/dev/fdset/x"}),
    ("add-fd", None),
    ("add-fd", {"fdset-id": "x"}),
    ("add-fd", {"fdset-id": 1e30}),
    ("getfd", {}),
    ("getfd", {"fdname": "x"}),
    ("closefd", {"fdname": "x"}),
    ("remove-fd", {}),
    ("remove-fd", {"fdset-id": 9}),
    ("remove-fd", {"fdset-id": 9, "fd": 1}),
    ("human-monitor-command", None),
    ("human-monitor-command", {"command-line": "info status", "cpu-index": 2}),
    ("human-monitor-command", {"command-line": "info status", "cpu-index": -1}),
    ("object-add", {"id": "m"}),
    ("object-add", {"qom-type": "memory-backend-ram", "size": 4096}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "m"}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "m", "size": 0}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "m", "size": "x"}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "1m", "size": 4096}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "m", "size": 4096, "foo": 1}),
    ("object-add", {"qom-type": "nosuch", "id": "m", "size": 4096}),
    ("object-del", {"id": "nosuch"}),
    ("device_add", None),
    ("device_add", {"driver": "nosuch"}),
    ("device_add", {"driver": "pc-dimm", "id": "d"}),
    ("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "nosuch"}),
    ("migrate", None),
    ("migrate", {"uri": 5}),
    ("migrate", {"uri": "fd:nosuch"}),
    ("migrate", {"uri": "tcp:x"}),
    ("migrate", {"uri": "unix:/nosuch/x", "foo": 1}),
    ("migrate-incoming", None),
    ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}),
    ("migrate-start-postcopy", None),
    ("migrate_cancel", {"x": 1}),
    ("migrate-set-capabilities", None),
    ("migrate-set-capabilities", {"capabilities": {}}),
    ("migrate-set-capabilities", {"capabilities": [7]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "nosuch", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": 1}]}),
    ("migrate-set-parameters", {"nosuch": 1}),
    ("migrate-set-parameters", {"max-bandwidth": "x"}),
    ("migrate-set-parameters", {"downtime-limit": -1}),
    ("migrate-set-parameters", {"downtime-limit": 2_000_001}),
    ("qmp_capabilities", None),
    ("qmp_capabilities", {"enable": ["foo"]}),
]


@pytest.mark.parametrize(("name", "arguments"), WRONG)
def test_errors_are_the_same(unstarted: Pair, name: str, arguments: object) -> None:
    theirs, ours = both(unstarted, name, arguments)
    assert set(theirs) == {"error"}
    assert ours == theirs


@pytest.mark.parametrize("line", [
    "nosuch", "nosuch x", "info nosuch", "info ramblock x", "info mtree -q", "gpa2hva", "gpa2hva x",
    "gpa2hva 1 2", "gpa2hva 0xffffffff00000000", "info status", "  info   status  ", "info name",
    "info network",
])  # fmt: skip
def test_the_human_monitor_says_the_same(unstarted: Pair, line: str) -> None:
    theirs, ours = both(unstarted, "human-monitor-command", {"command-line": line})
    assert ours == theirs


def test_wording_of_newer_qemus(unstarted: Pair) -> None:
    """QEMU 8.2: migration/migration.c, migrate_uri_parse; 7.2 said "expects a valid ..."."""
    theirs, ours = both(unstarted, "migrate", {"uri": "nosuch:x"})
    assert theirs["error"]["class"] == ours["error"]["class"]
    assert ours["error"]["desc"] == "unknown migration protocol: nosuch:x"


STOPPED = ("STOP", None)
RESUMED = ("RESUME", None)
WAS_RESET = ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
POWERED_DOWN = ("POWERDOWN", None)
WAS_SHUT_DOWN = ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

LIFE: list[tuple[str, list[tuple[str, Any]], str]] = [
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


def test_run_states_and_events_through_a_life(pair: Pair) -> None:
    for number, (command, events, state) in enumerate(LIFE):
        for one in pair:
            where = (number, command, one is pair[1])
            assert one.command(command) == {"return": {}}, where
            assert one.heard(len(events)) == events, where
            assert one.execute("query-status")["status"] == state, where
    for one in pair:
        one.send(b'{"execute": "quit", "id": 1}')
        # In some order.
        said = [one.receive(), one.receive()]
        said.sort(key=lambda message: "event" in message)
        assert said[0] == {"return": {}, "id": 1}
        assert (said[1]["event"], said[1]["data"]) == WAS_SHUT_DOWN


def test_saving_device_state(pair: Pair, tmp_path: Path) -> None:
    """Running and stopped, into a file and into a descriptor; the run state stays."""
    for one in pair:
        one.execute("cont")
        one.heard(1)
        one.execute("xen-save-devices-state", {"filename": str(tmp_path / "state")})
        assert one.heard(2) == [STOPPED, RESUMED]
        one.execute("stop")
        one.heard(1)
        memfd = os.memfd_create("state")
        write_only = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
        path = f"/dev/fdset/{one.execute('add-fd', None, (write_only,))['fdset-id']}"
        os.close(write_only)
        one.execute("xen-save-devices-state", {"filename": path, "live": False})
        assert one.heard() == []
        assert one.execute("query-status")["status"] == "paused"
        for state in ((tmp_path / "state").read_bytes(), os.pread(memfd, 1 << 24, 0)):
            sections = split_device_state(state)
            assert "globalstate" in [section.idstr for section in sections]
            assert state[-1] == 0
        os.close(memfd)
        one.execute("cont")
        assert one.heard(1) == [RESUMED]


def test_migrating_into_a_descriptor(pair: Pair) -> None:
    """Events, the numbers told afterwards, the run state; and it runs again."""
    capabilities = {"capabilities": [{"capability": "events", "state": True}]}
    told: list[Any] = []
    for one in pair:
        one.execute("migrate-set-capabilities", capabilities)
        assert {"capability": "events", "state": True} in one.execute("query-migrate-capabilities")
        one.execute("cont")
        one.heard(1)
        memfd = os.memfd_create("stream")
        one.execute("getfd", {"fdname": "stream"}, (memfd,))
        one.execute("migrate", {"uri": "fd:stream"})
        events: list[tuple[str, Any]] = []
        while ("MIGRATION", {"status": "completed"}) not in events:
            events += one.heard(1)
        # QEMU tells "device" each time only from 9.2 on; and of passes when the guest is slow.
        kept = [
            event
            for event in events
            if event[0] != "MIGRATION_PASS" and event != ("MIGRATION", {"status": "device"})
        ]
        assert kept == [
            ("MIGRATION", {"status": "setup"}),
            ("MIGRATION", {"status": "active"}),
            STOPPED,
            ("MIGRATION", {"status": "completed"}),
        ]
        # QEMU tells the end a little before it is.
        deadline_s = time.monotonic() + 10
        while (state := one.execute("query-status")["status"]) != "postmigrate":
            assert state == "finish-migrate"
            assert time.monotonic() < deadline_s
        assert os.pread(memfd, 4, 0) == b"QEVM"
        os.close(memfd)
        told.append(one.execute("query-migrate"))
        assert one.error("migrate", {"uri": "fd:stream"})[0] == "GenericError"
        one.execute("cont")
        assert one.heard(1) == [RESUMED]
    assert differences(told[0], told[1], "query-migrate") == {"more query-migrate.x-stillframe"}


def test_saving_guest_memory_by_address(pair: Pair, tmp_path: Path) -> None:
    """All of RAM, its end and what comes behind it, and nothing."""
    for one in pair:
        for start, size in ((0, RAM_MIB << 20), ((RAM_MIB << 20) - 5, 9), (1 << 40, 4096), (-1, 1)):
            path = tmp_path / "memory"
            path.unlink(missing_ok=True)
            one.execute("pmemsave", {"val": start, "size": size, "filename": str(path)})
            assert path.stat().st_size == size
            if start > 0:
                assert path.read_bytes() == bytes(size)
    # The guest's code, at the address that it was linked for.
    _, ours = pair
    ours.execute("pmemsave", {"val": 0x100000, "size": 3, "filename": str(path)})
    assert path.read_bytes() == IDLE
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("format_name", [None, "ppm", "png"])
def test_screendumps(pair: Pair, tmp_path: Path, format_name: str | None) -> None:
    for one in pair:
        arguments = {"filename": str(tmp_path / "picture")}
        if format_name:
            arguments["format"] = format_name
        one.execute("screendump", arguments)
        magic = (tmp_path / "picture").read_bytes()[:4]
        assert magic == (b"\x89PNG" if format_name == "png" else magic[:2] + b"\n" + magic[3:])
        if format_name != "png":
            assert magic[:2] == b"P6"


def test_hot_plugging_ram(pair: Pair) -> None:
    size = 64 << 20
    backend = {"qom-type": "memory-backend-ram", "id": "m0", "size": size}
    dimm = {"driver": "pc-dimm", "id": "d0", "memdev": "m0"}
    spare = {"qom-type": "memory-backend-memfd", "id": "m1", "size": size}
    listing = {"path": "/machine/peripheral"}
    for step in (
        ("object-add", backend), ("object-add", backend), ("device_add", dimm),
        ("device_add", dimm), ("device_add", dimm | {"id": "d1"}), ("object-del", {"id": "m0"}),
        ("query-memory-size-summary", None), ("object-add", spare),
        ("device_add", dimm | {"id": "d1", "memdev": "m1"}), ("object-del", {"id": "m1"}),
        ("qom-get", {"path": "/machine/peripheral/d0", "property": "type"}),
        ("query-memory-devices", None),
    ):  # fmt: skip
        theirs, ours = both(pair, *step)
        assert ours == theirs, step
    theirs, ours = both(pair, "query-memdev")
    assert differences(theirs["return"], ours["return"], "query-memdev") == set()
    assert {one["id"] for one in ours["return"]} == {"board.ram", "m0"}
    assert {"name": "d0", "type": "child<pc-dimm>"} in pair[1].execute("qom-list", listing)
    text = pair[1].execute("human-monitor-command", {"command-line": "info mtree -f"})
    assert f"0000000100000000-{(1 << 32) + size - 1:016x} (prio 0, ram): board.dimm0" in text


def test_several_clients_of_a_board_while_one_stops_it(pair: Pair, tmp_path: Path) -> None:
    """QEMU serves one client a monitor; a board's others go on asking."""
    _, ours = pair
    address = ours.socket.getpeername()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with RawQmp(address) as other:
                for _ in range(50):
                    assert other.execute("query-status")["status"] in ("running", "paused")
        except BaseException as error:
            failures.append(error)
            raise

    ours.execute("cont")
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        ours.execute("stop")
        ours.execute("cont")
    for thread in threads:
        thread.join(30)
    assert failures == []
