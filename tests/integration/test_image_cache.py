"""Complete images: made from snapshots, VMs on them, and their end."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import BusyError, MachineError, RefusedError
from stillframe.image.cached import ImageCache
from stillframe.restore.complete_image import CompleteImage
from stillframe.still.compact import compact
from stillframe.store import open_snapshot
from stillframe.store.locations import open_sink
from stillframe.store.small_objects import encoded
from stillframe.store.wholes import WholeForm, pointer_key, whole_key
from tests.support.image_cache import (  # noqa: F401 - fixtures
    PAGES,
    RAM_MIB,
    assert_on_image,
    image_cache,
    image_source,
    run,
    taken,
    wrong_pages,
)
from tests.support.image_vm import ram_differences
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.restored_vms import assert_guest_goes_on
from tests.support.small_file_system import mounted_tmpfs
from tests.support.taking import command, take

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]


def test_it_is_made_from_a_snapshot_that_there_is(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    first, second = tmp_path / "1.still", tmp_path / "2.still"
    take(source, first)
    api.take(source.pid, second, parent=first).wait(120)
    for file in (first, second):
        steps: list[tuple[int, int]] = []
        made = api.add_image(file, progress=lambda done, total: steps.append((done, total)))  # noqa: B023
        assert steps[-1][0] == steps[-1][1] > 0
        assert not made.in_use
        assert wrong_pages(cache, file) == []
        assert api.add_image(file).created == made.created  # it is there


@pytest.mark.parametrize("count", [1, 3])
def test_vms_on_it_have_the_snapshots_ram_and_go_on(
    source: GuestVm, cache: ImageCache, tmp_path: Path, count: int
) -> None:
    file = tmp_path / "x.still"
    before = source.wait_tick().n
    taken(source, file)
    content = {p: p.read_bytes() for p in cache.directory.glob("*/*.ram")}
    for vm in api.fork(file, count, paused=True):
        assert_on_image(vm)
        assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []
        vm.kill()
    vms = [api.restore(file)] if count == 1 else api.fork(file, count)
    for vm in vms:
        assert_on_image(vm)
        assert vm.resident() == 1.0
        assert vm.resident_ms is not None
        assert_guest_goes_on(vm, PAGES, before)
    # What they wrote is their own.
    assert content
    assert {p: p.read_bytes() for p in content} == content
    assert wrong_pages(cache, file) == []


def test_a_newer_qemu_has_its_files_for_reading_only(cache: ImageCache, tmp_path: Path) -> None:
    """So nobody makes holes in them, as a balloon that is plugged in later would."""
    has_linux_guest().require()
    has_uffd_wp().require()
    program, file = str(require_newer_qemu()), tmp_path / "x.still"
    with GuestVm(
        "linux", ram_mib=RAM_MIB, populate_mib=48, name="newer", binary=program
    ).start() as vm:
        taken(vm, file)
    vms = api.fork(file, 2, program=program)
    inodes = {path.stat().st_ino for path in cache.directory.glob("*/*.ram")}
    assert inodes
    for one in vms:
        assert_on_image(one)
        assert_guest_goes_on(one, PAGES)
        opened = [
            int(info.read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE
            for info in Path(f"/proc/{one.pid}/fdinfo").iterdir()
            if _inode(one.pid, info.name) in inodes
        ]
        assert set(opened) == {os.O_RDONLY}


def _inode(pid: int, fd: str) -> int | None:
    try:
        return Path(f"/proc/{pid}/fd/{fd}").stat().st_ino
    except OSError:
        return None


def test_it_stays_while_a_vm_runs_on_it(source: GuestVm, cache: ImageCache, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    snapshot_id = taken(source, file)
    vms = api.fork(file, 2)
    file.unlink()  # they need the snapshot no more
    assert [image.in_use for image in api.images()] == [True]
    with pytest.raises(BusyError, match="VMs run on it"):
        api.rm_images(snapshot_id[:12])
    other = tmp_path / "y.still"
    other_id = taken(source, other)
    for names in ((snapshot_id, other_id), (other_id, snapshot_id)):
        with pytest.raises(BusyError, match="VMs run on it"):
            api.rm_images(*names)
        assert len(api.images()) == 2
    api.image_limit(0)
    vms[0].kill()
    with pytest.raises(BusyError):
        api.rm_images(snapshot_id)
    assert_guest_goes_on(vms[1], PAGES)
    vms[1].kill()
    assert [image.id for image in api.rm_images(snapshot_id)] == [snapshot_id]
    assert api.images() == []


def test_a_damaged_one_is_passed_over(source: GuestVm, cache: ImageCache, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    taken(source, file)
    (ram,) = cache.directory.glob("*/0.ram")
    with ram.open("r+b") as image:
        image.write(b"not the guest's")
    vm = api.restore(file, paused=True, wait=True)
    assert vm.image_path is not None
    assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []


def test_what_a_vm_on_it_has_changed_is_known_for_nothing(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    """The kernel cannot protect it, so it stands still; but only its own pages are read."""
    file, second = tmp_path / "x.still", tmp_path / "y.still"
    taken(source, file)
    vm = api.restore(file)
    assert_guest_goes_on(vm, PAGES)
    with pytest.raises(RefusedError, match=r"file-backed-ram.*--mode stop.*--fill"):
        api.take(vm.pid, second, parent=file).wait(120)
    done = api.take(vm.pid, second, parent=file, mode="stop").wait(120)
    assert done.statistics.pages.unchanged > 1000
    assert_guest_goes_on(vm, PAGES)
    copy = api.restore(second, paused=True, wait=True)
    assert ram_differences(copy.pid, Path(copy.qmp_address), second) == []
    copy.kill()
    assert_guest_goes_on(api.restore(second), PAGES)


def test_one_in_memory_can_be_saved_while_it_runs(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, second = tmp_path / "x.still", tmp_path / "y.still"
    with mounted_tmpfs(tmp_path / "memory", "size=256m", "mode=0700") as place:
        monkeypatch.setenv("STILLFRAME_IMAGES", str(place))
        taken(source, file)
        vm = api.restore(file)
        assert vm.image_path is None
        api.take(vm.pid, second, parent=file).wait(120)
        assert_guest_goes_on(vm, PAGES)
        vm.kill()
        assert_guest_goes_on(api.restore(second), PAGES)


def test_where_it_does_not_start_on_one_it_is_filled_and_says_why(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object) -> None:
        raise MachineError("it will not", guest_state="none")

    asked: list[int] = []
    monkeypatch.setattr(CompleteImage, "begin", begin)
    start = importlib.import_module("stillframe.restore.start")
    monkeypatch.setattr(start, "check_memory", asked.append)
    file = tmp_path / "x.still"
    taken(source, file)
    vm = api.restore(file)
    assert vm.image_path is not None
    assert any("not on its complete image: it will not" in note for note in vm.notes), vm.notes
    assert len(asked) == 1


def test_fill_is_the_other_way(source: GuestVm, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    taken(source, file)
    assert api.restore(file, fill=True).image_path is not None
    assert all(vm.image_path is not None for vm in api.fork(file, 2, fill=True))


def test_a_whole_form_makes_no_image_for_the_snapshot_itself(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    """What a whole form holds is its writer's word, and only its own readers take it for that."""
    first, second, third = (tmp_path / f"{n}.still" for n in range(3))
    take(source, first)
    api.take(source.pid, second, parent=first).wait(120)
    source.wait_tick()
    api.take(source.pid, third, parent=first).wait(120)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    copy = theirs / "x.still"
    shutil.copy(second, copy)
    nonce = "0" * 16
    with open_snapshot(third) as other, open_snapshot(second) as own:
        sink = open_sink(whole_key(str(copy), nonce))
        compact(other, sink, whole_of=own.id)
        snapshot_id = own.id
    form = encoded(WholeForm(id=snapshot_id, nonce=nonce))
    Path(pointer_key(str(copy))).write_bytes(form)
    api.add_image(copy)
    vm = api.restore(second, paused=True, wait=True)
    assert ram_differences(vm.pid, Path(vm.qmp_address), second) == []
    vm.kill()
    with open_snapshot(copy) as read:
        assert cache.has(read.id, read.content_id)
        assert not cache.has(read.id)
    api.add_image(second)
    assert wrong_pages(cache, second) == []
    assert len(cache.images()) == 1


def test_two_processes_make_the_same_one(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    file = tmp_path / "x.still"
    take(source, file)
    makers = [
        subprocess.Popen(command("image", "add", str(file), "--json"), stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [json.loads(maker.communicate(timeout=240)[0]) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert len({output["id"] for output in outputs}) == len(cache.images()) == 1
    assert wrong_pages(cache, file) == []
    assert [p.name for p in cache.directory.iterdir() if p.name.startswith(".")] == []


def test_a_maker_is_killed_at_any_moment(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    file = tmp_path / "x.still"
    take(source, file)
    began_s = time.monotonic()
    assert run("image", "add", str(file)).returncode == 0
    whole_s = time.monotonic() - began_s
    for number in range(8):
        for image in cache.images():
            cache.remove(image.id)
        maker = subprocess.Popen(command("image", "add", str(file)), stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            maker.wait(whole_s * number / 7)
        maker.kill()
        maker.wait()
        if cache.images():
            assert wrong_pages(cache, file) == []
    api.add_image(file)
    assert wrong_pages(cache, file) == []
    assert [p.name for p in cache.directory.iterdir() if p.name.startswith(".")] == []


def test_the_command_line(source: GuestVm, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    shown = run("take", str(source.pid), "-o", str(file), "--image")
    assert "its complete image is kept" in shown.stdout
    listed = json.loads(run("image", "ls", "--json").stdout)
    (image,) = listed["images"]
    assert image["snapshot"] == str(file)
    assert image["vm"] == "origin"
    assert listed["limit_bytes"] == 16 << 30
    lines = run("image", "ls").stdout.splitlines()
    assert lines[0].split() == ["ID", "SIZE", "USED", "STATE", "VM", "SNAPSHOT"]
    assert lines[1].startswith(image["id"][:12])
    assert lines[-1].endswith("of 16.0 GiB")
    restored = json.loads(run("restore", str(file), "--json").stdout)
    assert restored["resident_ms"] is not None
    busy = run("image", "rm", image["id"][:12])
    assert (busy.returncode, busy.stdout) == (4, "")
    assert "is in use" in busy.stderr
    assert run("image", "rm", "--unused").stdout == "nothing to remove\n"
    run("kill", str(restored["pid"]))
    assert run("image", "limit", "4G").stdout == "4.0 GiB\n"
    assert run("image", "rm", "--unused").stdout.startswith(f"removed {image['id'][:12]}")
    for words in (["image", "rm"], ["image", "rm", "--unused", "abcdef"]):
        assert run(*words).returncode == 2
    assert run("image", "rm", "abcdef").returncode == 9


def test_images_are_made_and_removed_while_vms_start(
    source: GuestVm, cache: ImageCache, tmp_path: Path
) -> None:
    """Whichever way each of them is started, it has the snapshot's RAM."""
    file = tmp_path / "x.still"
    take(source, file)
    stop = threading.Event()

    def make_and_remove() -> None:
        while not stop.is_set():
            made = api.add_image(file)
            with contextlib.suppress(BusyError):
                cache.remove(made.id)

    maker = threading.Thread(target=make_and_remove)
    maker.start()
    try:
        for _ in range(8):
            vm = api.restore(file, paused=True, wait=True)
            assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []
            vm.kill()
    finally:
        stop.set()
        maker.join()
