"""``watch``: a VM stays armed, each snapshot holds what changed, and nothing wrong ever follows an
interruption."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import BusyError, NotFoundError, StillframeError
from stillframe.qmp.client import QmpClient
from stillframe.snapshot import watching
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.store import compaction
from stillframe.store.store import Store
from tests.support.bare_vm import BareVm
from tests.support.probes import has_uffd_wp
from tests.support.ram_truth import RamTruth
from tests.support.taking import command

pytestmark = pytest.mark.qemu
NAME = "web1"
ALONE = f"watched-{os.getpid()}"
"""No other VM of this host is called so."""


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STILLFRAME_STORE", str(tmp_path / "store"))
    return api.init()


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestVm]:
    """It writes without end."""
    with GuestVm("multiboot", ram_mib=64, mem_mib=8, rate_mib_per_s=20, name=NAME).start() as vm:
        yield vm


class Steps(api.Follower):
    """Lets a watch go on only when the test has looked: after each snapshot it may do something."""

    def __init__(self, *after: Callable[[], object]) -> None:
        self.snapshots: list[tuple[TakenSnapshot, bool]] = []
        self.interruptions: list[str] = []
        self.errors: list[StillframeError] = []
        self.absences: list[StillframeError] = []
        self._after = list(after)

    def taken(self, snapshot: TakenSnapshot, *, tracked: bool) -> None:
        self.snapshots.append((snapshot, tracked))
        if self._after:
            self._after.pop(0)()

    def failed(self, error: StillframeError) -> None:
        self.errors.append(error)

    def interrupted(self, why: str) -> None:
        self.interruptions.append(why)

    def gone(self, error: StillframeError) -> None:
        self.absences.append(error)
        if self._after:
            self._after.pop(0)()

    @property
    def tracked(self) -> list[bool]:
        return [tracked for _, tracked in self.snapshots]


def watch(vm: str | Path, steps: Steps, count: int, **options: object) -> None:
    assert api.watch(str(vm), every_s=0.05, count=count, follower=steps, **options) == count  # type: ignore[arg-type]


def unequal(store: Store, truth: RamTruth, steps: Steps) -> list[object]:
    """Pages of any snapshot that are not RAM's of its instant."""
    found: list[object] = []
    for number, (snapshot, _) in enumerate(steps.snapshots):
        with store.open(store.find(snapshot.id)) as opened:
            found += truth.differences(opened, number)
    return found


# --- the chain ------------------------------------------------------------------------------------


def test_each_chain_is_ram_at_its_instant_while_the_guest_writes(
    guest: GuestVm, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, steps = RamTruth(monkeypatch), Steps()
    watch(guest.qmp_path, steps, 6)
    assert steps.tracked == [False, True, True, True, True, True]
    assert unequal(store, truth, steps) == []
    parents = [store.find(taken.id).parent for taken, _ in steps.snapshots]
    assert parents == [None, *(taken.id for taken, _ in steps.snapshots[:-1])]
    for taken, tracked in steps.snapshots:
        pages = taken.statistics.pages
        assert (pages.unchanged > 0) is tracked
    assert guest.is_progressing()


def test_a_new_watcher_compares_with_the_snapshot_of_the_last(
    guest: GuestVm, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = RamTruth(monkeypatch)
    steps = Steps()
    watch(guest.qmp_path, steps, 2)
    again = Steps()
    watch(guest.qmp_path, again, 2)
    assert again.tracked == [False, True]
    assert store.find(again.snapshots[0][0].id).parent == steps.snapshots[-1][0].id
    steps.snapshots += again.snapshots
    assert unequal(store, truth, steps) == []


def test_older_snapshots_go_and_chains_stay_whole(
    guest: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = api.init(tmp_path / "short", full_every=2)
    truth, steps = RamTruth(monkeypatch), Steps()
    watch(guest.qmp_path, steps, 6, store=store, keep_last=1)
    assert steps.tracked == [False, True] * 3
    assert not steps.errors
    left = [entry.id for entry in store.list()]
    assert left == [taken.id for taken, _ in steps.snapshots[-2:]]  # the last, and its parent
    with store.open(store.find(left[-1])) as opened:
        assert truth.differences(opened) == []


def test_chains_stay_short_and_nobody_reads_all_of_ram(
    guest: GuestVm, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compacted in the background: snapshot after snapshot holds what was written, for ever."""
    monkeypatch.setattr(compaction, "MOST_FILES", 3)
    truth, steps = RamTruth(monkeypatch), Steps()
    watch(guest.qmp_path, steps, 10, keep_last=4)
    assert steps.tracked == [False] + [True] * 9
    assert not steps.errors
    catalog = store.catalog()
    lengths = [len(catalog.chain(entry)) for entry in catalog.entries.values()]
    assert max(lengths[-4:]) <= 3
    assert catalog.wholes
    for number, (snapshot, _) in enumerate(steps.snapshots):
        if snapshot.id in catalog.entries:
            with store.open(store.find(snapshot.id)) as opened:
                assert truth.differences(opened, number) == []
    assert api.check(store=store, read_data=1.0).findings == ()


# --- interruptions --------------------------------------------------------------------------------


def test_after_a_reset_nothing_is_taken_on_trust(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = RamTruth(monkeypatch)
    with BareVm("-m", "64", "-M", "q35", name=NAME) as vm, QmpClient.connect(vm.second_qmp) as qmp:

        def reset() -> None:
            told = threading.Event()
            forget = qmp.subscribe(lambda event: told.set() if event.name == "RESET" else None)
            qmp.execute("system_reset")
            assert told.wait(60)
            forget()

        steps = Steps(reset)
        watch(vm.qmp, steps, 3)
        assert steps.tracked == [False, False, True]
        assert steps.interruptions == ["the VM was reset"]
        assert unequal(store, truth, steps) == []


def test_hotplugged_ram_ends_what_was_tracked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = RamTruth(monkeypatch)
    with (
        BareVm("-m", "64,slots=2,maxmem=256M", "-M", "q35", name=NAME) as vm,
        QmpClient.connect(vm.second_qmp) as qmp,
    ):

        def plug() -> None:
            qmp.execute(
                "object-add", {"qom-type": "memory-backend-ram", "id": "m1", "size": 32 << 20}
            )
            qmp.execute("device_add", {"driver": "pc-dimm", "id": "d1", "memdev": "m1"})

        steps = Steps(plug)
        watch(vm.qmp, steps, 3)
        assert steps.tracked == [False, False, True]
        assert steps.interruptions == ["RAM blocks came or went"]
        assert unequal(store, truth, steps) == []


def test_a_device_that_was_unplugged_ends_what_was_tracked(store: Store) -> None:
    with (
        BareVm(
            "-m", "64", "-M", "q35", "-device", "qemu-xhci", "-device", "usb-tablet,id=t1",
            name=NAME,
        ) as vm,
        QmpClient.connect(vm.second_qmp) as qmp,
    ):  # fmt: skip

        def unplug() -> None:
            told = threading.Event()
            forget = qmp.subscribe(
                lambda event: told.set() if event.name == "DEVICE_DELETED" else None
            )
            qmp.execute("device_del", {"id": "t1"})
            assert told.wait(60)
            forget()

        steps = Steps(unplug)
        watch(vm.qmp, steps, 2)
        assert steps.tracked == [False, False]
        assert "unplugged" in steps.interruptions[0]


def test_a_lost_monitor_ends_what_was_tracked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines: list[api.ProcessMachine] = []
    original = api.connect

    def connect(vm: str | int) -> api.ProcessMachine:
        machines.append(original(vm))
        return machines[-1]

    def cut() -> None:
        number = machines[-1].monitor_fd()
        assert number is not None
        with socket.socket(fileno=os.dup(number)) as monitor:
            monitor.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(watching, "connect", connect)
    with BareVm("-m", "64", name=ALONE) as vm:
        steps = Steps(cut)
        watch(vm.qmp, steps, 3)
        assert steps.tracked == [False, False, True]
        assert len(steps.interruptions) == 1
        assert len(machines) == 2


def test_the_vm_comes_back_by_its_name(store: Store) -> None:
    vms = [BareVm("-m", "64", name=ALONE)]

    def kill() -> None:
        vms[0].process.kill()
        vms[0].process.wait()

    try:
        steps = Steps(kill, lambda: vms.append(BareVm("-m", "64", name=ALONE)))
        watch(ALONE, steps, 3)
        assert steps.tracked == [False, False, True]
        assert len(steps.absences) == 1
        assert store.list(vms=[ALONE])
    finally:
        for vm in vms:
            vm.close()


def test_a_vm_that_stays_away_is_waited_for_as_long_as_asked(store: Store) -> None:
    with BareVm("-m", "64", name=ALONE) as vm:
        steps = Steps(vm.process.kill)
        with pytest.raises(StillframeError):
            api.watch(ALONE, every_s=0.05, most_away_s=0.1, follower=steps)
    with pytest.raises(NotFoundError):  # never there: that is a mistake
        api.watch(ALONE, every_s=0.05, follower=Steps())


def test_a_store_that_cannot_be_written_to_fails_one_snapshot_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Store.target
    broken = threading.Event()

    def target(self: Store, *arguments: object) -> object:
        if broken.is_set():
            broken.clear()
            raise BusyError("the store is out for lunch")
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "target", target)
    truth = RamTruth(monkeypatch)
    with BareVm("-m", "64", name=NAME) as vm:
        steps = Steps(broken.set)
        watch(vm.qmp, steps, 3)
        assert len(steps.errors) == 1
        assert steps.tracked == [False, True, True]  # nothing was lost of what was noted
        assert unequal(store, truth, steps) == []


# --- the command ----------------------------------------------------------------------------------


def start(vm: Path, *arguments: str, fault: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("watch", str(vm), "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"STILLFRAME_FAULT": fault},
    )


def first_snapshot(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    found: dict[str, object] = json.loads(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_guest_runs_on(
    guest: GuestVm, store: Store, number: signal.Signals
) -> None:
    process = start(guest.qmp_path, "--every", "1h")
    try:
        taken = first_snapshot(process)
        with pytest.raises(StillframeError):  # one at a time
            api.take(str(guest.qmp_path)).wait()
        process.send_signal(number)
        _, complaints = process.communicate(timeout=60)
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()
    assert guest.is_progressing()
    assert [entry.id for entry in store.list()] == [taken["id"]]
    assert api.take(str(guest.qmp_path)).wait(120).id


def test_kill_9_lifts_the_protection(
    guest: GuestVm, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(guest.qmp_path, "--every", "1h")
    first_snapshot(process)
    process.kill()
    process.communicate(timeout=60)
    assert guest.is_progressing()
    truth, steps = RamTruth(monkeypatch), Steps()
    watch(guest.qmp_path, steps, 2)
    assert steps.tracked == [False, True]
    assert unequal(store, truth, steps) == []


@pytest.mark.parametrize("point", ["stopped", "protected", "swept", "rearmed", "durable"])
def test_kill_9_where_it_hurts(guest: GuestVm, store: Store, point: str) -> None:
    """In the second snapshot, of which nothing is left."""
    process = start(guest.qmp_path, "--every", "0.1s", fault=f"{point}:2=kill")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert guest.is_progressing()
    assert len(store.list()) == 1
    steps = Steps()
    watch(guest.qmp_path, steps, 2)
    assert steps.tracked == [False, True]


@pytest.mark.parametrize("every", ["0", "soon", "-1m"])
def test_times_that_make_no_sense(every: str) -> None:
    done = subprocess.run(
        command("watch", "x", "--every", every), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--every" in done.stderr
