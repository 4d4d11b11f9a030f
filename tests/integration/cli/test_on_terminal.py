"""``restore``, ``fork`` and ``kill`` on a terminal: what is left to be seen, and Ctrl-C there."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe.restore.restored import FORK_PREFIX, FORKS, RestoredVm, list_restored
from tests.integration.cli.program import PROGRAM, run
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restored_vms import assert_guest_goes_on
from tests.support.terminal import CTRL_C, Terminal
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]

PAGES = 2048
NAME = f"terminal-{os.getpid()}"
CLONES = [f"{NAME}-1", f"{NAME}-2"]
CANCELLED = ["stillframe: cancelled"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def port() -> int:
    return _free_port()


@pytest.fixture(scope="module")
def source(port: int) -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    words = ("-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22")
    words += ("-device", "virtio-net-pci,netdev=net0")
    options = {"ram_mib": 128, "mem_mib": 8, "populate_mib": 32, "tick_ms": 500}
    with GuestVm("linux", name=NAME, extra=words, **options).start() as vm:  # type: ignore[arg-type]
        yield vm


@pytest.fixture(scope="module")
def snapshot(source: GuestVm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "x.still"
    done = run("take", source.qmp_path, "-o", path, "-q")
    assert done.returncode == 0, done.stderr
    return path


def stillframe(*words: object, slow: str = "") -> Terminal:
    """Start it on a terminal; slow in a place of ``tests.support.slow_program``."""
    program = (sys.executable, "-m", "tests.support.slow_program", slow) if slow else PROGRAM
    return Terminal([*program, *map(str, words)], {})


def by_name() -> dict[str, RestoredVm]:
    return {vm.name: vm for vm in list_restored()}


def assert_nothing_is_left(places: Path, terminal: Terminal) -> None:
    assert not list_restored()
    assert not list(places.iterdir())
    assert not list(FORKS.glob(f"{FORK_PREFIX}{terminal.pid}-*"))


def ports_table(port: int) -> list[list[str]]:
    """The words of the lines on ports, as they should be."""
    vms = by_name()
    return [
        ["NAME", "PORT", "IN PLACE OF", "OF THE GUEST"],
        *(
            [name, f"127.0.0.1:{vms[name].forwards[0].port}", f"127.0.0.1:{port}", ":22/tcp"]
            for name in CLONES
        ),
    ]


def columns(lines: list[str]) -> list[list[str]]:
    return [re.split(" {2,}", line) for line in lines]


def test_the_bar_of_a_restore_makes_room_for_its_result(snapshot: Path) -> None:
    terminal = stillframe("restore", snapshot, "--wait", slow="frames")
    assert terminal.wait() == 0, terminal.seen
    assert b"restoring" in terminal.seen
    assert re.search(rb"\d+ % \(", terminal.seen)
    (vm,) = list_restored()
    facts = dict(re.split(" {2,}", line) for line in terminal.screen() if ": " not in line)
    assert list(facts) == ["pid", "name", "state", "QMP", "log", "runs after", "all of RAM"]
    assert (facts["pid"], facts["name"]) == (str(vm.pid), NAME)
    assert (facts["state"], facts["QMP"]) == ("running", vm.qmp_address)
    rest = terminal.screen()[len(facts) :]
    assert rest
    assert all(line.startswith("note: ") for line in rest)


def test_the_bar_of_a_fork_makes_room_for_two_tables(source: GuestVm, port: int) -> None:
    terminal = stillframe("fork", source.process.pid, "-n", "2", slow="sweep")
    assert terminal.wait() == 0, terminal.seen
    assert b"taking" in terminal.seen
    head, first, second, *rest = columns(terminal.screen())
    assert head == ["NAME", "PID", "STATE", "RUNS AFTER", "QMP"]
    for row, name in zip((first, second), CLONES, strict=True):
        vm = by_name()[name]
        assert row[:3] + row[4:] == [name, str(vm.pid), "running", vm.qmp_address]
        assert re.fullmatch(r"[\d.]+ m?s", row[3])
        assert_guest_goes_on(vm, PAGES)
    assert rest[:3] == ports_table(port)
    assert rest[3:]
    assert all(row[0].startswith("note: ") for row in rest[3:])


def test_kill_says_a_line_for_each_vm_and_no_more(snapshot: Path) -> None:
    assert run("fork", snapshot, "-n", "2", "--paused").returncode == 0
    vms = by_name()
    terminal = stillframe("kill", *CLONES)
    assert terminal.wait() == 0
    assert terminal.screen() == [f"ended {name} (pid {vms[name].pid})" for name in CLONES]
    terminal = stillframe("kill", CLONES[0])
    assert terminal.wait() == 9
    (line,) = terminal.screen()
    assert line.startswith(f"stillframe: no VM '{CLONES[0]}' that was restored by you runs; ")


def test_ports_are_told_without_a_terminal_too(source: GuestVm, port: int) -> None:
    done = run("fork", source.process.pid, "-n", "2", "-q")
    assert done.returncode == 0, done.stderr
    lines = columns(done.stdout.decode().splitlines())
    assert lines[3:6] == ports_table(port)
    assert len({vm.forwards[0].port for vm in list_restored()} | {port}) == 3
    for vm in list_restored():
        socket.create_connection(("127.0.0.1", vm.forwards[0].port), 60).close()
    assert run("kill", CLONES[0]).returncode == 0
    shown = json.loads(run("ps", "--json").stdout)
    (told,) = (vm["forwards"] for vm in shown if vm["name"] == CLONES[1])
    assert (told[0]["port"], told[0]["source_port"]) == (
        by_name()[CLONES[1]].forwards[0].port, port,
    )  # fmt: skip


@pytest.mark.parametrize("again", [b"", CTRL_C], ids=["once", "again-and-again"])
def test_ctrl_c_while_a_restore_waits_for_ram_ends_its_vm(
    snapshot: Path, places: Path, again: bytes
) -> None:
    terminal = stillframe("restore", snapshot, "--wait", slow="frames")
    wait_until(lambda: b"restoring" in terminal.seen, "no bar was drawn")
    wait_until(lambda: [vm.state for vm in list_restored()] == ["running"], "it does not run")
    (vm,) = list_restored()
    terminal.type(CTRL_C)
    assert terminal.wait(again=again) == 130
    assert terminal.screen() == CANCELLED
    assert b"Traceback" not in terminal.seen
    assert not vm.is_running
    assert_nothing_is_left(places, terminal)


@pytest.mark.parametrize("again", [b"", CTRL_C], ids=["once", "again-and-again"])
def test_ctrl_c_before_the_guest_runs_leaves_no_vm(
    snapshot: Path, places: Path, again: bytes
) -> None:
    terminal = stillframe("restore", snapshot, slow="load")
    wait_until(list_restored, "no VM was started")
    (vm,) = list_restored()
    terminal.type(CTRL_C)
    assert terminal.wait(again=again) == 130
    assert terminal.screen() == CANCELLED
    assert not vm.is_running
    assert_nothing_is_left(places, terminal)


@pytest.mark.parametrize("again", [b"", CTRL_C], ids=["once", "again-and-again"])
def test_ctrl_c_in_a_fork_ends_its_clones_and_the_vm_goes_on(
    source: GuestVm, places: Path, again: bytes
) -> None:
    terminal = stillframe("fork", source.process.pid, "-n", "2", slow="sweep")
    running = ["running"] * 2
    wait_until(lambda: [vm.state for vm in list_restored()] == running, "the clones do not run")
    vms = list_restored()
    terminal.type(CTRL_C)
    assert terminal.wait(again=again) == 130
    assert terminal.screen() == CANCELLED
    assert not any(vm.is_running for vm in vms)
    assert_nothing_is_left(places, terminal)
    assert source.is_progressing(30)
    assert source.command("audit").startswith(f"audit ok pages={PAGES} ")
