"""Each QMP command of a board and of a real QEMU: the same names, types and errors.

What differs is listed here, and in docs/reference/board-qmp.md. What the commands bring about is in
tests/contract/test_qmp_contract.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.qmp_machines import board_monitor, make_disk, qemu_monitor
from tests.support.raw_qmp import RawQmp
from tests.support.reply_shape import differences

pytestmark = pytest.mark.qemu

Pair = tuple[RawQmp, RawQmp]

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
    return make_disk(tmp_path_factory.mktemp("disk"))


def start_pair(disk: Path, directory: Path) -> Iterator[Pair]:
    """A QEMU and a board alike, both not started yet."""
    with (
        board_monitor(directory, disk) as our_path,
        qemu_monitor(disk) as their_path,
        RawQmp(their_path) as theirs,
        RawQmp(our_path) as ours,
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


def test_what_is_told_of_a_migration(pair: Pair) -> None:
    told = []
    for one in pair:
        memfd = os.memfd_create("stream")
        one.execute("getfd", {"fdname": "stream"}, (memfd,))
        os.close(memfd)
        one.execute("migrate", {"uri": "fd:stream"})
        deadline_s = time.monotonic() + 60
        while (info := one.execute("query-migrate"))["status"] != "completed":
            assert time.monotonic() < deadline_s
        told.append(info)
    assert differences(told[0], told[1], "query-migrate") == {"more query-migrate.x-stillframe"}
