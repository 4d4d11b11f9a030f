"""What restored VMs and clones are called, and what is said of one while it is filled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import NotFoundError, UsageError
from stillframe.image.filler import Filler
from stillframe.image.filling import Filling
from stillframe.restore import start
from stillframe.restore.restored import RestoredVm, find_restored
from tests.integration.cli.program import run
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restored_vms import assert_guest_goes_on
from tests.support.taking import take
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]

RAM_MIB, PAGES = 192, 8192
NAME = f"named-{os.getpid()}"
"""No other VM of this host is called so."""


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=RAM_MIB, populate_mib=64, name=NAME).start() as vm:
        yield vm


@pytest.fixture(scope="module")
def snapshot(source: GuestVm) -> Path:
    file = source.directory / "x.still"
    take(source, file)
    return file


@pytest.mark.parametrize("way", ["name", "arguments"])
def test_a_restored_vm_is_known_by_its_new_name(snapshot: Path, tmp_path: Path, way: str) -> None:
    new = f"{NAME}-{way}"
    words = ["--name", new] if way == "name" else ["--", "-name", f"guest={new}"]
    shown = json.loads(run("restore", snapshot, "--json", *words).stdout)
    assert shown["name"] == new
    (listed,) = [vm for vm in json.loads(run("ps", "--json").stdout) if vm["name"] == new]
    assert listed["pid"] == shown["pid"]
    # The take is told its name only, and waits for the image before it asks the monitor.
    done = run("take", new, "-o", tmp_path / "y.still")
    assert done.returncode == 0, done.stderr
    clones = api.fork(new, 1)
    assert [vm.name for vm in clones] == [f"{new}-1"]
    ended = run("kill", new)
    assert (ended.returncode, ended.stdout) == (
        0, f"ended {new} (pid {shown['pid']})\n".encode()
    )  # fmt: skip
    assert_guest_goes_on(clones[0], PAGES)
    with pytest.raises(NotFoundError):
        find_restored(new)


def test_a_dry_run_names_it_too(snapshot: Path) -> None:
    plan = api.plan_restore(snapshot, name="a,b")
    assert plan.name == "a,b"
    with pytest.raises(UsageError, match="not empty"):
        api.plan_restore(snapshot, name="")


def test_clones_get_names_that_are_free(source: GuestVm, snapshot: Path) -> None:
    first = api.fork(snapshot, 2)
    second = api.fork(source.pid, 2)
    names = [vm.name for vm in (*first, *second)]
    assert names == [f"{NAME}-{number}" for number in (1, 2, 3, 4)]
    first[0].kill()
    (again,) = api.fork(snapshot, 1)
    assert again.name == f"{NAME}-1"


def test_clones_are_not_named_behind_our_back(snapshot: Path) -> None:
    with pytest.raises(UsageError, match=r"not named so; use --name PATTERN"):
        api.fork(snapshot, 1, extra_args=["-name", "other"])


def surveyed(vm: RestoredVm) -> api.SurveyedVm:
    """As the survey has it, once its monitor has answered: it is asked for a moment only."""
    found: list[api.SurveyedVm] = []

    def has_answered() -> bool:
        found.extend(one for one in api.survey() if one.pid == vm.pid)
        return found[-1].version is not None

    wait_until(has_answered)
    return found[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_one_that_is_being_filled_is_not_said_to_be_unfit(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Its filler is in the way of a snapshot now, which waits for it; nobody is to end it."""
    held: list[Filling] = []
    with monkeypatch.context() as patch:
        # We fill what is asked for, and no more yet.
        patch.setattr(Filler, "sweep", lambda _self: None)
        patch.setattr(start, "hand_over", lambda filling, _path: held.append(filling))
        vm, *_ = api.fork(snapshot, count)
    assert vm.is_being_filled
    seen = surveyed(vm)
    assert seen.snapshotable
    assert seen.reasons == (
        "its image is being filled: take, fork and watch wait until all is there",
    )
    checks = {check.name: check for check in api.doctor(vm.pid)}
    assert checks["image"].status == "warn"
    assert not {"second-mapper", "userfaultfd"} & {
        name for name, check in checks.items() if check.status == "fail"
    }
    held[0].sweep()
    assert held[0].wait(60)
    seen = surveyed(vm)
    assert (seen.snapshotable, seen.reasons) == (True, ())
