"""Images with real guests: run before RAM is there, wait for it, survive the filler's death."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guests.qemu import GuestVm, qemu_binary
from stillframe.errors import (
    BusyError,
    DataError,
    HostError,
    MachineError,
    NotFoundError,
)
from stillframe.image import filler
from stillframe.image import filling as filling_room
from stillframe.image.filler import Filler
from stillframe.image.filling import Filling
from stillframe.image.small_stream import small_stream
from stillframe.image.working_set import save_working_set, working_set_path
from stillframe.kernel.remote_attach import fetch_fd
from stillframe.kernel.remote_missing import close_there
from stillframe.machine.finding import connect
from stillframe.restore.on_image import plan_image
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.image_killing import kill_filler, kill_fillers
from tests.support.image_vm import PAGE, ImageVms, image_vms, read_waiting
from tests.support.probes import has_kvm, has_linux_guest, has_multiboot_guest, has_uffd_wp
from tests.support.taking import take
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

RAM_MIB, POPULATE_MIB = 160, 48
FILL_S = 60.0
NUMA = (
    "-object", "memory-backend-ram,id=low,size=64M,prealloc=on",
    "-object", "memory-backend-memfd,id=high,size=96M,share=on",
    "-numa", "node,nodeid=0,cpus=0,memdev=low", "-numa", "node,nodeid=1,memdev=high",
)  # fmt: skip


def _programs() -> list[str]:
    """Stock QEMU, and a newer one."""
    if importlib.util.find_spec("tests.support.newer_qemu") is not None:
        return ["stock", "newer"]
    return ["stock"]


def _program(which: str) -> str:
    if which == "stock":
        return qemu_binary()
    return str(importlib.import_module("tests.support.newer_qemu").require_newer_qemu())


def _guest(memory: str, extra: tuple[str, ...], program: str) -> GuestVm:
    if memory == "kvm":
        return GuestVm(
            "multiboot", accelerator="kvm", ram_mib=96, mem_mib=48, clock_pages=16,
            memory="private", binary=program,
        )  # fmt: skip
    return GuestVm(
        "linux",
        ram_mib=RAM_MIB,
        populate_mib=POPULATE_MIB,
        memory=memory,  # type: ignore[arg-type]
        binary=program,
        extra=extra,
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A snapshot of a guest; each kind is taken once."""
    has_linux_guest().require()
    has_uffd_wp().require()
    taken: dict[tuple[str, str, tuple[str, ...]], Path] = {}

    def get(which: str = "stock", memory: str = "private", extra: tuple[str, ...] = ()) -> Path:
        key = (which, memory, extra)
        if key not in taken:
            file = tmp_path_factory.mktemp("snapshots") / "x.still"
            with _guest(memory, extra, _program(which)).start() as vm:
                take(vm, file)
            taken[key] = file
        return taken[key]

    return get


@pytest.fixture
def vms(snapshot: Callable[..., Path], tmp_path: Path) -> Iterator[ImageVms]:
    """VMs of the plain snapshot."""
    with image_vms(snapshot(), tmp_path / "vms") as found:
        yield found


@pytest.fixture
def sweep_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Until it is called, nothing is filled but what is asked for, and the working set."""
    sweep, held = Filler.sweep, list[Filler]()
    monkeypatch.setattr(Filler, "sweep", lambda one: held.append(one))

    def go_on() -> None:
        monkeypatch.setattr(Filler, "sweep", sweep)
        for one in held:
            sweep(one)

    return go_on


def _assert_goes_on(vms: ImageVms, number: int) -> None:
    console = vms.console(number)
    try:
        assert console.is_progressing()
    finally:
        console.close()


@pytest.mark.parametrize("which", _programs())
@pytest.mark.parametrize("memory", ["private", "memfd", "numa"])
@pytest.mark.parametrize("count", [1, 3])
def test_clones_run_and_have_the_snapshots_ram(
    snapshot: Callable[..., Path],
    tmp_path: Path,
    sweep_later: Callable[[], None],
    which: str,
    memory: str,
    count: int,
) -> None:
    file = snapshot(which, *(("private", NUMA) if memory == "numa" else (memory,)))
    with image_vms(file, tmp_path / "paused", _program(which)) as vms:
        filling = vms.start(count, paused=True, working_set=False)
        assert {vm.state for vm in vms.started} == {"paused"}
        assert filling.progress().done < filling.progress().frames
        sweep_later()
        assert [vms.differences(number) for number in range(count)] == [[]] * count
        assert filling.wait(FILL_S)
        assert [vms.differences(number) for number in range(count)] == [[]] * count
    with image_vms(file, tmp_path / "running", _program(which)) as vms:
        filling = vms.start(count)
        for number, vm in enumerate(vms.started):
            assert vm.state == "running"
            assert vm.running_ms is not None
            _assert_goes_on(vms, number)
        assert filling.wait(FILL_S)
        for number in range(count):
            _assert_goes_on(vms, number)
    assert os.listdir(tmp_path / "running") != ["image.json"]


SANDBOX = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)


@pytest.mark.parametrize("count", [1, 2])
def test_a_sandboxed_vm(snapshot: Callable[..., Path], tmp_path: Path, count: int) -> None:
    with image_vms(snapshot("stock", "private", SANDBOX), tmp_path / "vms") as vms:
        filling = vms.start(count)
        for number in range(count):
            _assert_goes_on(vms, number)
        assert filling.wait(FILL_S)


@pytest.mark.parametrize("count", [1, 2])
def test_the_kernel_waits_for_pages_too(
    snapshot: Callable[..., Path], tmp_path: Path, count: int
) -> None:
    """Under KVM it is the kernel that touches most pages."""
    has_kvm().require()
    has_multiboot_guest().require()
    file = snapshot("stock", "kvm")
    with image_vms(file, tmp_path / "paused") as vms:
        filling = vms.start(count, paused=True)
        for number in range(count):
            # QEMU itself changes the VAPIC's page when it loads the device, whatever brought RAM
            # (hw/i386/kvmvapic.c, vapic_post_load).
            assert set(vms.differences(number)) <= {("pc.ram", 0xE8)}
        assert filling.wait(FILL_S)
    with image_vms(file, tmp_path / "running") as vms:
        filling = vms.start(count, working_set=False)
        for number in range(count):
            _assert_goes_on(vms, number)
        assert filling.progress().faults
        assert filling.wait(FILL_S)
        for number in range(count):
            _assert_goes_on(vms, number)


def test_the_stream_has_no_page_of_the_image(snapshot: Callable[..., Path], vms: ImageVms) -> None:
    filling = vms.start(paused=True)
    stream = b"".join(small_stream(filling.snapshot, filling.numbers))
    assert len(stream) < 4 << 20
    assert len(stream) < filling.snapshot.manifest.stream_bytes // 10
    assert filling.wait(FILL_S)


def test_clones_share_what_they_read(vms: ImageVms) -> None:
    filling = vms.start(3)
    for number in range(3):
        _assert_goes_on(vms, number)
    assert filling.wait(FILL_S)
    for vm in vms.started:
        maps = Path(f"/proc/{vm.pid}/smaps").read_text().split("/memfd:stillframe-image")[1]
        fields = {line.split()[0]: line.split()[1] for line in maps.splitlines()[1:20]}
        own_kib = int(fields["Anonymous:"])
        assert own_kib << 10 < RAM_MIB << 20
        assert own_kib < int(fields["Rss:"])


def test_frames_that_were_asked_for_come_first_the_next_time(
    vms: ImageVms, snapshot: Callable[..., Path], tmp_path: Path
) -> None:
    path = working_set_path(vms.file)
    path.unlink(missing_ok=True)
    filling = vms.start()
    _assert_goes_on(vms, 0)
    assert filling.wait(FILL_S)
    kept = json.loads(path.read_text())
    assert kept["snapshot"] == filling.snapshot.id
    assert kept["frames"]
    path.write_text("{")  # damaged: as good as none
    with image_vms(vms.file, tmp_path / "second") as second:
        assert second.start().wait(FILL_S)
    path.write_text(json.dumps(kept | {"frames": kept["frames"] * 2}))
    with image_vms(vms.file, tmp_path / "third") as third:
        assert third.start().wait(FILL_S)
    path.unlink()


@pytest.mark.parametrize("taken_over", [False, True])
def test_recorded_frames_are_filled_though_nobody_asks(
    vms: ImageVms, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    """Before the rest, which is not filled here at all; also by who takes the filling over."""
    monkeypatch.setattr(Filler, "sweep", lambda _self: None)
    with open_snapshot(vms.file) as opened:
        ram = opened.block_number("pc.ram")
        data = {frame: run for frame, run in opened.index.runs_of_block(ram) if run.kind}
        recorded = sorted(data)[-3:]
        content_id = opened.content_id
    path = working_set_path(vms.file)
    path.unlink(missing_ok=True)
    if not taken_over:
        save_working_set(vms.file, content_id, recorded)
    filling = vms.start(paused=True)
    if taken_over:
        filling.close()
        save_working_set(vms.file, content_id, recorded)
        filling = Filling.adopt(vms.record_path)
    pages = filling.image.pages[0]
    wait_until(lambda: all(pages.all_there(data[frame].first_page, 1) for frame in recorded))
    others = [frame for frame in sorted(data) if frame not in recorded]
    assert not all(pages.all_there(data[frame].first_page, 1) for frame in others)
    filling.close()
    path.unlink(missing_ok=True)


def test_a_damaged_frame_is_never_shown(vms: ImageVms, tmp_path: Path) -> None:
    content = bytearray(vms.file.read_bytes())
    damaged = tmp_path / "damaged.still"
    with open_snapshot(vms.file) as opened:
        ram = opened.block_number("pc.ram")
        frames = sorted({frame for frame, run in opened.index.runs_of_block(ram) if run.kind})
        entry = opened.index.frame(frames[len(frames) // 2])
        pages = [
            run.first_page for frame, run in opened.index.runs_of_block(ram)
            if frame == frames[len(frames) // 2] and run.kind
        ]  # fmt: skip
    content[entry.offset_bytes + entry.stored_bytes // 2] ^= 1
    damaged.write_bytes(content)
    with image_vms(damaged, tmp_path / "damaged-vms") as broken:
        filling = broken.start(paused=True)
        with pytest.raises(DataError, match="damaged"):
            filling.wait(FILL_S)
        assert not filling.image.pages[0].all_there(pages[0], 1)
        filling.close()
        # Whoever goes on finds the same.
        heir = Filling.adopt(broken.record_path)
        with pytest.raises(DataError, match="damaged"):
            heir.wait(FILL_S)
        heir.close()


def test_another_process_goes_on(vms: ImageVms) -> None:
    filling = vms.start()
    filling.hand_over(log_path=vms.directory / "filler.log")
    _assert_goes_on(vms, 0)
    deadline = time.monotonic() + FILL_S
    while vms.record_path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not vms.record_path.exists(), (vms.directory / "filler.log").read_text()
    _assert_goes_on(vms, 0)
    with pytest.raises(NotFoundError):
        Filling.adopt(vms.record_path)


def test_a_hand_over_that_fails_changes_nothing(
    vms: ImageVms, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = vms.start(working_set=False)
    ended = subprocess.Popen(["true"])
    with monkeypatch.context() as patch:
        patch.setattr(filling_room, "start_process", lambda *_: ended)
        with pytest.raises(HostError, match="did not get ready"):
            process.hand_over()
    assert process.wait(FILL_S)
    _assert_goes_on(vms, 0)


def test_the_record_of_a_sealed_image_is_not_filled_on(vms: ImageVms) -> None:
    """As when the filler is killed right after its last step but one."""
    filling = vms.start(2, paused=True, working_set=False)
    record = vms.record_path.read_bytes()
    assert filling.wait(FILL_S)
    vms.record_path.write_bytes(record)
    with pytest.raises(NotFoundError, match="complete"):
        Filling.adopt(vms.record_path)
    assert not vms.record_path.exists()
    assert vms.differences() == []


def test_one_fills_at_a_time(vms: ImageVms) -> None:
    filling = vms.start(paused=True)
    with pytest.raises(BusyError):
        Filling.adopt(vms.record_path)
    filling.close()
    heir = Filling.adopt(vms.record_path)
    with pytest.raises(BusyError):
        Filling.adopt(vms.record_path)
    assert heir.wait(FILL_S)


def test_nobody_is_left_to_fill_for(vms: ImageVms) -> None:
    vms.start(paused=True).close()
    vms.stop()
    with pytest.raises(MachineError, match="have ended"):
        Filling.adopt(vms.record_path)
    assert not vms.record_path.exists()


def test_another_snapshot_under_its_name_is_not_taken(
    vms: ImageVms, snapshot: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.still"
    copy.write_bytes(vms.file.read_bytes())
    with image_vms(copy, tmp_path / "of-copy") as clones:
        clones.start(paused=True).close()
        copy.write_bytes(snapshot("stock", "memfd").read_bytes())
        with pytest.raises(DataError, match="not the snapshot"):
            Filling.adopt(clones.record_path)


def test_the_filler_is_killed_and_no_page_is_wrong(vms: ImageVms, tmp_path: Path) -> None:
    done = kill_fillers(vms.file, kills=20, seed=10, directory=tmp_path)
    assert max(done) > 1


def test_faults_that_the_dead_one_had_read_are_told_again(
    vms: ImageVms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler, "_MOST_WORKERS", 0)  # else the image's completion wakes, too
    first = vms.start(paused=True, working_set=False)
    with open_snapshot(vms.file) as opened:
        runs = [r for _, r in opened.index.runs_of_block(opened.block_number("pc.ram")) if r.kind]
        page = next(
            r.first_page
            for r in reversed(runs)
            if not first.image.pages[0].all_there(r.first_page, 1)
        )
        content = opened.read_page("pc.ram", page)
    first.close()
    (clone,) = json.loads(vms.record_path.read_text())["clones"]
    pidfd = os.pidfd_open(clone["pid"])
    uffd = fetch_fd(pidfd, clone["uffd"])
    seen: list[bytes] = []
    address = clone["addresses"][0] + page * PAGE
    reader = threading.Thread(
        target=lambda: seen.append(bytes(read_waiting(clone["pid"], address, PAGE))), daemon=True
    )
    reader.start()
    assert select.select([uffd], [], [], 60)[0]
    os.read(uffd, 32)  # the filler that died had read it, and did nothing more
    os.close(uffd)
    os.close(pidfd)
    heir = Filling.adopt(vms.record_path)
    reader.join(60)
    assert seen == [content]
    assert heir.progress().done < heir.progress().frames
    heir.close()


def test_without_the_clones_own_descriptor_that_test_would_fail(
    vms: ImageVms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a clone whose descriptor is closed reads zeroes once the filler is dead."""
    monkeypatch.setattr(filler, "_MOST_WORKERS", 0)  # nothing is filled but what is asked for
    vms.start(paused=True, working_set=False).close()
    (clone,) = json.loads(vms.record_path.read_text())["clones"]
    close_there(clone["pid"], clone["uffd"])
    with pytest.raises(HostError, match="lost its userfaultfd"):
        Filling.adopt(vms.record_path)
    assert vms.differences()


def test_a_guest_that_runs_goes_on_after_its_fillers_death(vms: ImageVms) -> None:
    for _ in range(20):
        kill_filler(vms.start(2, working_set=False).hand_over())
        if vms.record_path.exists():
            break
        vms.stop()
    else:
        pytest.fail("no filler could be killed before it was through")
    time.sleep(0.3)  # they run into holes, and wait
    heir = Filling.adopt(vms.record_path)
    for number in range(2):
        _assert_goes_on(vms, number)
    assert heir.wait(FILL_S)
    for number in range(2):
        _assert_goes_on(vms, number)


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_no_snapshot_of_holes(
    vms: ImageVms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A VM whose image is being filled is refused; afterwards it is a VM like any other."""
    with monkeypatch.context() as patch:
        patch.setattr(filler, "_MOST_WORKERS", 0)
        vms.start(paused=True, working_set=False).close()
    with pytest.raises(BusyError, match="userfaultfd"):
        _take_clone(vms, tmp_path / "early.still", mode)
    assert not (tmp_path / "early.still").exists()
    assert Filling.adopt(vms.record_path).wait(FILL_S)
    _take_clone(vms, tmp_path / "again.still", mode)
    with open_snapshot(vms.file) as first, open_snapshot(tmp_path / "again.still") as again:
        pages = dict(first.iter_pages("pc.ram"))
        assert dict(again.iter_pages("pc.ram")) == pages


def _take_clone(vms: ImageVms, file: Path, mode: str) -> None:
    with connect(str(vms.qmp_path())) as machine:
        options = SnapshotOptions(mode=mode)  # type: ignore[arg-type]
        SnapshotJob(lambda c: take_snapshot(c, machine, LocalSink(file), options)).wait(60)


def test_a_snapshot_that_shrinks_leaves_its_guests_waiting(
    vms: ImageVms, tmp_path: Path, sweep_later: Callable[[], None]
) -> None:
    copy = tmp_path / "copy.still"
    copy.write_bytes(vms.file.read_bytes())
    with image_vms(copy, tmp_path / "of-copy") as clones:
        filling = clones.start(paused=True, working_set=False)
        os.truncate(copy, 4096)
        sweep_later()
        with pytest.raises(DataError, match="truncated"):
            filling.wait(FILL_S)
        filling.close()
        with pytest.raises(DataError):
            Filling.adopt(clones.record_path)
        copy.write_bytes(vms.file.read_bytes())  # put back, it is all right again
        assert Filling.adopt(clones.record_path).wait(FILL_S)
        assert clones.differences() == []


def test_what_cannot_be_on_an_image_is_named(snapshot: Callable[..., Path]) -> None:
    with open_snapshot(snapshot()) as opened:
        machine, blocks = opened.manifest.machine, opened.blocks
    assert machine is not None
    words = machine.argv[1:]
    for more, reason in (
        (("-overcommit", "mem-lock=on"), "locked"),
        (("-device", "vhost-user-fs-pci,chardev=c,tag=t"), "another process maps its RAM"),
        (("-netdev", "vhost-user,id=n,chardev=c"), "another process maps its RAM"),
        (("-device", "vfio-pci,host=00:01.0"), "needs all of RAM"),
        (("-device", "virtio-balloon-pci"), "all would lose"),
    ):
        assert reason in plan_image([*words, *more], blocks, share=False).streamed
    assert not plan_image([*words, "-device", "virtio-balloon-pci"], blocks, share=True).streamed
    huge = [msgspec.structs.replace(block, page_size_bytes=2 << 20) for block in blocks]
    assert "huge pages" in plan_image(words, huge, share=True).streamed
