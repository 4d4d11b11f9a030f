"""`kill -9` at random moments: of an image's filler, of who restores, of a clone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

from stillframe.errors import NotFoundError
from stillframe.image.filling import Filling
from stillframe.qmp.client import QmpClient
from stillframe.restore.restored import RestoredVm, adopt_orphans, list_restored
from tests.support.image_vm import image_vms, ram_differences
from tests.support.taking import command
from tests.support.waiting import wait_until

FILL_S = 60.0


def kill_filler(pid: int) -> None:
    """End a filler at once; it may be through already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + FILL_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)


def kill_fillers(file: Path, *, kills: int, seed: int, directory: Path) -> list[int]:
    """Kill the filler at random moments, let another go on each time, and compare all of RAM,
    read while that happens and afterwards.

    Returns:
        How often one was killed before the image was complete, for each VM started.
    """
    chance = random.Random(seed)
    done: list[int] = []
    while sum(done) < kills:
        with image_vms(file, directory / f"killed-{len(done)}") as clones:
            filling = clones.start(1 + len(done) % 2, paused=True, working_set=False)
            seen: list[object] = []
            reader = threading.Thread(target=lambda vm=clones, to=seen: to.append(vm.differences()))
            reader.start()
            count = 0
            while True:
                pid = filling.hand_over(log_path=clones.directory / "filler.log")
                time.sleep(chance.uniform(0, 0.15))
                kill_filler(pid)
                try:
                    filling = Filling.adopt(clones.record_path)
                except NotFoundError:
                    break  # it was through
                count += 1
                if count >= 8:
                    assert filling.wait(FILL_S)
                    break
            reader.join(FILL_S)
            assert not reader.is_alive(), "somebody still waits for a page"
            assert seen == [[]]
            for number in range(len(clones.started)):
                assert clones.differences(number) == []
            done.append(count)
    return done


def filler_processes(image_path: str | None) -> list[int]:
    """The processes that fill an image, or wait to."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "stillframe.image.filler_process" in words and image_path in words:
                found.append(int(entry.name))
    return found


def kill_restorers(file: Path, *, kills: int, seed: int, runtime: Path) -> tuple[int, int]:
    """Kill ``stillframe restore`` at random moments. What it leaves is no VM, or one that is known
    and whose RAM is the snapshot's, all of it.

    Args:
        runtime: what $XDG_RUNTIME_DIR is, for us, too.

    Returns:
        How many were killed before they were through, and how many VMs had come to be.
    """
    chance = random.Random(seed)
    words = command("restore", str(file), "--paused", "--quiet")
    began_s = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    took_s = time.monotonic() - began_s
    killed = came_to_be = 0
    _see_to_what_is_left(file, runtime)
    while killed < kills:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, took_s))
        killed += process.poll() is None
        process.kill()
        process.wait()
        came_to_be += _see_to_what_is_left(file, runtime)
    return killed, came_to_be


def _see_to_what_is_left(file: Path, runtime: Path) -> int:
    """Whatever VM there is, is known, gets what it waits for, and is right; how many they are."""
    known: list[int] = []

    def is_settled() -> bool:
        adopt_orphans()  # one may wait for a page, in the middle of its loading
        return set(emulators(runtime)) <= {vm.pid for vm in _loaded(runtime)}

    wait_until(is_settled)
    for vm in _loaded(runtime):
        assert adopt_orphans() == {}
        assert vm.wait_resident(FILL_S)
        assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []
        known.append(vm.pid)
        vm.kill()
        wait_until(lambda path=vm.image_path: not filler_processes(path))  # type: ignore[misc]
    wait_until(lambda: not emulators(runtime))  # the last one may have been between fork and exec
    return len(known)


def _loaded(runtime: Path) -> list[RestoredVm]:
    """Restored VMs that have taken their state in: the others end, their pipe being closed."""
    found = []
    for vm in list_restored():
        if not Path(vm.directory).is_relative_to(runtime):  # another test run's
            continue
        with contextlib.suppress(Exception), QmpClient.connect(vm.qmp_address) as qmp:
            if qmp.execute("query-status")["status"] != "inmigrate":  # type: ignore[index,call-overload]
                found.append(vm)
    return found


def emulators(runtime: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if words.startswith(b"/usr/bin/qemu") and str(runtime).encode() in words:
                found += [int(entry.name)] * (state not in "ZX")
    return found


def kill_clones(file: Path, *, kills: int, seed: int, directory: Path) -> None:
    """Kill one of two clones at random moments: the other one's RAM is right, and is filled."""
    chance = random.Random(seed)
    for number in range(kills):
        with image_vms(file, directory / f"of-two-{number}") as clones:
            filling = clones.start(2, paused=True, working_set=False)
            seen: list[object] = []
            reader = threading.Thread(
                target=lambda vm=clones, to=seen: to.append(vm.differences(1))
            )
            reader.start()
            filling.hand_over(log_path=clones.directory / "filler.log", heir=True)
            time.sleep(chance.uniform(0, 0.15))
            os.kill(clones.started[0].pid, signal.SIGKILL)
            reader.join(FILL_S * 3)
            assert not reader.is_alive(), "it still waits for a page"
            assert seen == [[]]
            wait_until(lambda path=clones.record_path: not path.exists())  # type: ignore[misc]
            assert clones.differences(1) == []
        wait_until(lambda path=clones.record_path: not filler_processes(str(path)))  # type: ignore[misc]
