"""Many clones of a running VM, and the forking process killed again and again (``make soak``)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Set
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from guests.serial import SerialConsole
from stillframe import api
from stillframe.restore.restored import RestoredVm, list_restored
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.taking import REPOSITORY

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(5400)]
KILLS = int(os.environ.get("STILLFRAME_SOAK_COUNT", "200"))
CLONES = int(os.environ.get("STILLFRAME_SOAK_CLONES", "32"))
PAGES, ANSWER_S = 2048, 600.0


@pytest.fixture(autouse=True)
def needs(places: Path) -> None:
    has_linux_guest().require()
    has_uffd_wp().require()


def assert_right(console: SerialConsole) -> None:
    """The guest runs, and its memory is what it wrote."""
    console.wait_tick(ANSWER_S)
    audit = console.command("audit", timeout_s=ANSWER_S)
    assert audit.startswith(f"audit ok pages={PAGES} ")


def assert_clone_right(vm: RestoredVm) -> None:
    console = SerialConsole(next(Path(path) for path in vm.sockets if "serial" in path))
    try:
        assert_right(console)
    finally:
        console.close()


def guest(ram_mib: int, tick_ms: int) -> GuestVm:
    """One that rests, so that many run beside each other."""
    return GuestVm(
        "linux", ram_mib=ram_mib, mem_mib=8, populate_mib=ram_mib // 4, rate_mib_per_s=1,
        tick_ms=tick_ms, name="origin", append="sf.rest_us=20000",
    )  # fmt: skip


def test_many_clones() -> None:
    with guest(256, 1000).start() as source:
        began_s = time.monotonic()
        vms = api.fork(source.pid, CLONES)
        print(
            f"{CLONES} clones of 256 MiB: all ran after"
            f" {max(vm.first_instruction_ms or 0 for vm in vms):.0f} ms,"
            f" all of RAM after {time.monotonic() - began_s:.1f} s"
        )
        for vm in vms:
            assert vm.image_path is not None
            assert_clone_right(vm)
        rollups = [Path(f"/proc/{vm.pid}/smaps_rollup").read_text().split() for vm in vms]
        private = [int(words[words.index("Private_Dirty:") + 1]) >> 10 for words in rollups]
        print(f"private memory of one, after an audit of all: {min(private)} to {max(private)} MiB")
        for vm in vms[::2]:
            vm.kill()
        assert_right(source.console)
    for vm in vms[1::2]:  # the source has ended, too
        assert_clone_right(vm)


def processes(*texts: str) -> set[int]:
    """Those whose command line has all these texts."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().decode()
            if all(text in words for text in texts):
                found.add(int(entry.parent.name))
    return found


def await_end(*texts: str, but: Set[int] = frozenset()) -> None:
    deadline_s = time.monotonic() + 60
    while (left := processes(*texts) - but) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not left


def test_the_forking_process_is_killed(places: Path) -> None:
    """At any moment: the clones end, or all of their RAM was there; the source goes on."""
    chance = random.Random(20261129)
    command = [sys.executable, "-c", "import sys; from stillframe import api;"
               " api.fork(int(sys.argv[1]), 2)"]  # fmt: skip
    ended = 0
    with guest(128, 200).start() as source:
        longest_s = 0.0
        for _ in range(KILLS):
            # What nobody kills tells how long it takes at present.
            if chance.random() < 0.1 or not longest_s:
                began_s = time.monotonic()
                subprocess.run([*command, str(source.pid)], cwd=REPOSITORY, check=True)
                longest_s = time.monotonic() - began_s
            else:
                child = subprocess.Popen([*command, str(source.pid)], cwd=REPOSITORY)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(chance.random() * longest_s)
                child.send_signal(signal.SIGKILL)
                child.wait()
            await_end("stillframe/image/end_process.py")
            # Those whose image is complete live on.
            whole = [vm for vm in list_restored() if not Path(vm.image_path or "").exists()]
            await_end("-incoming", str(places), but={vm.pid for vm in whole})
            alive = [vm for vm in whole if vm.is_running]
            ended += not alive
            for vm in alive:
                assert_clone_right(vm)
                vm.kill()
            assert_right(source.console)
    print(f"{ended} of {KILLS} forks were killed before all of RAM was there; no page was wrong")
