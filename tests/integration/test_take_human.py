"""A QEMU with a monitor for people only: QEMU saves it itself, and goes on however that ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillframe import api
from stillframe.errors import (
    BusyError,
    MachineError,
    RefusedError,
    SinkError,
    SnapshotCancelled,
    StillframeError,
    UsageError,
)
from stillframe.machine.process import preflight_host
from stillframe.snapshot.faultpoints import HUMAN_POINTS
from stillframe.store import open_snapshot
from tests.support.bare_vm import BareVm
from tests.support.human import HumanGuestVm, human
from tests.support.listening import wait_listening
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restoring import Restores
from tests.support.taking import consistency, finish, start_take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu]

MODES: tuple[api.Mode, ...] = ("background", "stop")
STOCK, NEWER = "stock", "newer"
SMALL = f"small-{os.getpid()}"
"""No other VM of this host is called so."""
WAY = {"background": "its own background snapshot", "stop": "while it was stopped"}


def running(binary: str | None) -> HumanGuestVm:
    has_uffd_wp().require()
    has_linux_guest().require()
    return HumanGuestVm(
        ram_mib=128, mem_mib=32, rate_mib_per_s=0, tick_ms=50, binary=binary
    ).start()


@pytest.fixture(scope="module")
def stock() -> Iterator[HumanGuestVm]:
    with running(None) as vm:
        yield vm


@pytest.fixture(scope="module")
def newer() -> Iterator[HumanGuestVm]:
    with running(require_newer_qemu()) as vm:
        yield vm


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> HumanGuestVm:
    """The guest of the QEMU that the parameter names."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, HumanGuestVm)
    return found


def assert_unharmed(vm: HumanGuestVm) -> None:
    """The guest goes on, and QEMU's capabilities are as they were."""
    assert vm.is_progressing(), "the guest does not go on"
    assert "VM status: running" in human(vm.qmp_path, "info status")
    assert ": on" not in human(vm.qmp_path, "info migrate_capabilities")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vm", [STOCK, NEWER], indirect=True)
def test_it_shows_one_instant_and_restores(
    vm: HumanGuestVm, tmp_path: Path, mode: api.Mode
) -> None:
    file = tmp_path / "a.still"
    taken = api.take(str(vm.qmp_path), file, mode=mode).wait(120)
    assert_unharmed(vm)
    report = consistency(vm, file)
    assert report.consistent, str(report)
    assert WAY[mode] in taken.notes[0]
    assert taken.statistics.state == "completed"
    assert taken.statistics.downtime_ms > 0
    assert taken.statistics.pages.data * 4096 > 32 << 20
    with open_snapshot(file) as snapshot:
        assert snapshot.manifest.machine is not None
        assert snapshot.manifest.machine.argv[-1] == vm.command_line()[-1]
    restores = Restores(tmp_path)
    try:
        assert restores.restore(file, program=vm.command_line()[0]).state == "running"
    finally:
        restores.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("vm", "point"),
    [*((STOCK, point) for point in HUMAN_POINTS), (NEWER, "migrating")],
    indirect=["vm"],
)
def test_kill_9(vm: HumanGuestVm, tmp_path: Path, point: str, mode: str) -> None:
    """Before 8.1 a QEMU whose background snapshot loses its reader stands still for good: so the
    guard reads on. That of a stopped VM lets it go on."""
    process = start_take(vm, tmp_path / "a.still", "--mode", mode, fault=f"{point}=kill")
    assert finish(process)[0] == -9
    assert vm.is_progressing(), "the guest does not go on"
    # It takes one client: the guard has ended once we are let in.
    file = tmp_path / "b.still"
    retry(lambda: api.take(str(vm.qmp_path), file, mode="background").wait(120))
    assert consistency(vm, file).consistent
    assert_unharmed(vm)
    assert [path.name for path in tmp_path.iterdir()] == ["b.still"]


def retry(take: Callable[[], object]) -> None:
    """Until the guard, which is at work yet, has let go of the monitor, and put all back."""

    def is_taken() -> bool:
        try:
            take()
        except BusyError:
            return False
        return True

    wait_until(is_taken, "the guard holds on to the monitor", within_s=120.0)


class Sink:
    """Takes its first bytes, tells, and goes on once it may."""

    description = "a sink"

    def __init__(self, error: StillframeError | None = None) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()
        self.aborted = False
        self._error = error

    def write(self, data: object) -> None:
        self.reached.set()
        self.goes_on.wait(60)
        if self._error is not None:
            raise self._error

    def commit(self) -> None:
        raise AssertionError("there is nothing to commit")

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vm", [STOCK], indirect=True)
def test_cancelled_midway(vm: HumanGuestVm, mode: api.Mode) -> None:
    sink = Sink()
    job = api.take(str(vm.qmp_path), sink, mode=mode)
    assert sink.reached.wait(60)
    job.cancel()
    sink.goes_on.set()
    with pytest.raises(SnapshotCancelled) as cancelled:
        job.wait(60)
    assert cancelled.value.guest_state == "running"
    assert sink.aborted
    assert_unharmed(vm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vm", [STOCK], indirect=True)
def test_the_destination_is_full_midway(vm: HumanGuestVm, mode: api.Mode) -> None:
    sink = Sink(SinkError("full"))
    sink.goes_on.set()
    with pytest.raises(SinkError, match="full") as full:
        api.take(str(vm.qmp_path), sink, mode=mode).wait(60)
    assert full.value.guest_state == "running"
    assert_unharmed(vm)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with started(tmp_path / "m") as path:
        yield path


class started(BareVm):  # noqa: N801 - used like a function
    def __init__(self, path: Path, *arguments: str) -> None:
        self._path = path
        monitor = ("-monitor", f"unix:{path},server=on,wait=off")
        machine = ("-nodefaults", "-M", "q35", "-m", "16")
        super().__init__(*machine, *monitor, *arguments, name=SMALL, qmp=False)
        wait_listening(path)

    def __enter__(self) -> Path:  # type: ignore[override]
        return self._path


def test_by_name_into_a_store(small: Path, tmp_path: Path) -> None:
    store = api.init(tmp_path / "store")
    taken = api.take(SMALL, store=store, tags=("first",)).wait(60)
    with api.open(api.locate(f"{SMALL}@first", store=store)) as snapshot:
        assert snapshot.id == taken.id
    with pytest.raises(UsageError, match="no QMP monitor"):
        api.connect(SMALL)


def test_what_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.still"

    def refused(mode: api.Mode = "background") -> str:
        with pytest.raises(RefusedError) as error:
            api.take(str(small), file, mode=mode).wait(60)
        assert error.value.remedy
        return str(error.value)

    human(small, "migrate_set_capability auto-converge on")
    assert "auto-converge" in refused()
    human(small, "migrate_set_capability auto-converge off", "stop")
    assert "the VM is paused" in refused("stop")
    human(small, "cont")
    ksm = tmp_path / "run"
    ksm.write_text("1\n")
    monkeypatch.setattr(preflight_host, "KSM_RUN", ksm)
    assert "KSM" in refused()
    api.take(str(small), file, mode="stop").wait(60)
    other = tmp_path / "b.still"
    with pytest.raises(UsageError, match="needs a QMP monitor"):
        api.take(str(small), other, for_analysis=True).wait(60)
    with pytest.raises(UsageError, match="needs a QMP monitor"):
        api.take(str(small), other, disks="overlay").wait(60)
    with pytest.raises(MachineError, match="does not speak QMP"):
        api.take(str(small), other, parent=file).wait(60)


def test_a_device_that_cannot_be_saved(tmp_path: Path) -> None:
    with (
        started(tmp_path / "m", "-device", "pci-serial-2x") as path,
        pytest.raises(RefusedError, match="pci-serial-2x"),
    ):
        api.take(str(path), tmp_path / "a.still").wait(60)


def test_what_qemu_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    memory = f"memory-backend-file,id=r,size=16M,mem-path={ram},share=on"
    with started(tmp_path / "m", "-object", memory, "-machine", "memory-backend=r") as path:
        if "ext" not in file_system(tmp_path):
            pytest.skip("tmp_path is not on a disk file system")
        with pytest.raises(RefusedError, match="not compatible") as error:
            api.take(str(path), tmp_path / "a.still").wait(60)
        assert "--mode stop" in str(error.value.remedy)
        api.take(str(path), tmp_path / "a.still", mode="stop").wait(60)


def file_system(path: Path) -> str:
    """Its type (proc(5))."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return max((w[1], w[2]) for w in lines if str(path).startswith(w[1]))[1]


def test_somebody_else_talks_with_it(small: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(small))
        assert b"QEMU" in other.recv(100)
        with pytest.raises(BusyError):
            api.take(str(small), tmp_path / "a.still").wait(60)
