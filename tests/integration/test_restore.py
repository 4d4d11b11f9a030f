"""`restore` of real guests: the new VM next to the old one, and every way to fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import stillframe
from guests.monitor import qmp_execute
from guests.qemu import GuestVm, qemu_binary
from guests.serial import SerialConsole
from stillframe.errors import (
    BusyError,
    DataError,
    HostError,
    MachineError,
    NotFoundError,
    UsageError,
)
from stillframe.machine.finding import connect, list_vms
from stillframe.model import MachineRecord
from stillframe.restore.disk_use import is_written
from stillframe.restore.start import RestoredVm, restore
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.still.host_mark import HostKey
from stillframe.still.import_stream import import_stream
from stillframe.still.writer import SnapshotWriter
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support.guest_fixtures import GuestFactory
from tests.support.probes import has_huge_pages, has_linux_guest, has_uffd_wp
from tests.support.stream_vm import into_file
from tests.support.taking import take
from tests.support.waiting import wait_until

IMPORTED_FROM = str(Path(stillframe.__file__).parents[1])
"""Where this very package is: programs that run elsewhere are to take it too."""

pytestmark = pytest.mark.qemu

Restorer = Callable[..., RestoredVm]
RAM_MIB = 128


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    """A guest that most tests share; its snapshot is in ``source.directory``."""
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=RAM_MIB, memory="shm", name="first").start() as vm:
        take(vm, vm.directory / "x.still")
        yield vm


@pytest.fixture
def snapshot(source: GuestVm) -> Path:
    return source.directory / "x.still"


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[Restorer]:
    """``restore`` with everything in ``tmp_path``; the new VMs are killed after the test."""
    pids: list[int] = []

    def start(path: Path, **options: Any) -> RestoredVm:
        values: dict[str, Any] = {"directory": tmp_path / "vm", "program": qemu_binary()}
        vm = restore(path, **(values | options))
        pids.append(vm.pid)
        return vm

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def emulators(directory: Path) -> set[int]:
    """The VMs that were started with something in a directory."""
    return {vm.pid for vm in list_vms() if any(str(directory) in word for word in vm.argv)}


def machine_record(path: Path) -> MachineRecord:
    with open_snapshot(path) as opened:
        record = opened.manifest.machine
    assert record is not None
    return record


def rewrite_manifest(path: Path, to: Path, *, here: bool = True, **fields: Any) -> Path:
    """A copy of a snapshot with other facts about its machine. ``here``: marked as taken here."""
    with open_snapshot(path) as opened, SnapshotWriter(LocalSink(to, overwrite=True)) as writer:
        manifest = opened.manifest
        by_frame: dict[int, list[Any]] = {}
        for number in range(len(opened.blocks)):
            for frame, run in opened.index.runs_of_block(number):
                by_frame.setdefault(frame, []).append(run)
        for frame, raw in opened.container.iter_frames(range(opened.index.frame_count)):
            if frame in by_frame:
                runs = sorted(by_frame[frame], key=lambda run: run.raw_offset)
                writer.append(writer.encode(raw), runs)
            else:
                writer.append_stream(raw)
        assert manifest.machine is not None
        fields = {"command_line": ()} | fields if "argv" in fields else fields
        machine = msgspec.structs.replace(manifest.machine, **fields)
        new = msgspec.structs.replace(manifest, machine=machine)
        writer.finish(new, key=HostKey.load_or_make() if here else None)
    return to


def with_options(path: Path, to: Path, *more: str, **fields: Any) -> Path:
    """A copy of a snapshot whose command line has more options."""
    argv = (*machine_record(path).argv, *more)
    return rewrite_manifest(path, to, argv=argv, **fields)


def assert_nothing_left(tmp_path: Path, *allowed: str) -> None:
    assert not emulators(tmp_path)
    assert set(os.listdir(tmp_path)) <= set(allowed)


# Both guests go on


@pytest.mark.parametrize("memory", ["private", "memfd", "shm", "file", "hugetlb"])
def test_next_to_its_running_source(
    linux_guest: GuestFactory, restored: Restorer, tmp_path: Path, memory: str
) -> None:
    if memory == "hugetlb":
        has_huge_pages(2 * RAM_MIB).require()  # both VMs have such memory
    vm = linux_guest(memory=memory, ram_mib=RAM_MIB)
    options = {"mode": "stop"} if memory == "file" else {}
    if not options:
        has_uffd_wp().require()
    take(vm, tmp_path / "x.still", **options)
    seen: list[tuple[int, int]] = []
    new = restored(tmp_path / "x.still", wait=True, on_progress=lambda *done: seen.append(done))
    assert new.state == "running"
    console = SerialConsole(tmp_path / "vm/serial0.sock")
    assert console.is_progressing()
    assert vm.is_progressing()
    assert console.command("audit").startswith("audit ok pages=8192 ")
    assert vm.command("audit").startswith("audit ok pages=8192 ")
    assert seen[-1][0] == seen[-1][1] > RAM_MIB << 10
    assert Path(new.log_path).read_text() == ""
    assert set(new.sockets) == {str(tmp_path / "vm/serial0.sock"), new.qmp_address}
    assert qmp_execute(vm.qmp_path, "query-status")["status"] == "running"
    assert qmp_execute(Path(new.qmp_address), "query-status")["status"] == "running"
    console.close()


def test_under_kvm(multiboot_guest: GuestFactory, restored: Restorer, tmp_path: Path) -> None:
    has_uffd_wp().require()
    vm = multiboot_guest(accelerator="kvm", ram_mib=64, mem_mib=16)
    take(vm, tmp_path / "x.still")
    assert restored(tmp_path / "x.still").state == "running"
    console = SerialConsole(tmp_path / "vm/serial0.sock")
    assert console.is_progressing()
    assert vm.is_progressing()
    assert console.command("audit").startswith("audit ok pages=4096 ")
    console.close()


def free_display() -> int:
    """The number of a VNC display that nobody listens on."""
    for number in range(70, 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", 5900 + number))
            return number
    raise AssertionError("all displays are in use")


def test_with_everything_that_must_move(
    linux_guest: GuestFactory, restored: Restorer, tmp_path: Path
) -> None:
    """Disks of both kinds, ports, files and sockets that the first VM holds."""
    has_uffd_wp().require()
    for name in ("a", "b"):
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / name), "64M"]
        subprocess.run(create, check=True)
    (tmp_path / "c").write_bytes(bytes(1 << 20))
    old = tmp_path / "old"
    old.mkdir()
    extra = f"""
        -drive file={tmp_path}/a,if=none,id=d0,format=qcow2 -device virtio-blk-pci,drive=d0
        -blockdev driver=file,filename={tmp_path}/b,node-name=b0
        -blockdev driver=qcow2,file=b0,node-name=b1 -device virtio-blk-pci,drive=b1
        -drive file={tmp_path}/c,if=none,id=c0,format=raw,readonly=on
        -device virtio-blk-pci,drive=c0
        -netdev user,id=n0,hostfwd=tcp:127.0.0.1:0-:22 -device virtio-net-pci,netdev=n0
        -netdev socket,id=n1,listen=127.0.0.1:0 -device e1000,netdev=n1
        -vnc 127.0.0.1:{free_display()} -gdb unix:{old}/gdb,server=on,wait=off -pidfile {old}/pid
        -chardev file,id=f0,path={old}/out -device isa-serial,chardev=f0
        -chardev socket,id=m0,path={old}/m0,server=on,wait=off -mon chardev=m0,mode=readline
        -object rng-random,id=r0,filename=/dev/urandom -device virtio-rng-pci,rng=r0
        -D {old}/debug -msg timestamp=on
    """.split()
    vm = linux_guest(ram_mib=RAM_MIB, extra=extra)
    take(vm, tmp_path / "x.still")
    before = {path: path.stat().st_mtime_ns for path in old.iterdir()}
    new = restored(tmp_path / "x.still")
    assert new.state == "running"
    console = SerialConsole(tmp_path / "vm/serial0.sock")
    assert console.is_progressing()
    assert vm.is_progressing()
    assert {path: path.stat().st_mtime_ns for path in old.iterdir()} == before
    assert is_written(str(tmp_path / "a"))
    assert is_written(str(tmp_path / "vm/disk0.qcow2"))
    assert any("being written by another program" in note for note in new.notes)
    files = {
        entry["inserted"]["file"]: entry["inserted"]["ro"]
        for entry in qmp_execute(Path(new.qmp_address), "query-block")
        if "inserted" in entry
    }
    assert files == {
        str(tmp_path / "vm/disk0.qcow2"): False,
        str(tmp_path / "vm/disk1.qcow2"): False,
        str(tmp_path / "c"): True,
    }
    vm.stop()
    assert not is_written(str(tmp_path / "a")), "the new VM may write the first one's disk"
    assert not is_written(str(tmp_path / "b")), "the new VM may write the first one's disk"
    assert console.command("audit").startswith("audit ok ")
    console.close()
    take_again(new, tmp_path / "again.still")
    again = restored(tmp_path / "again.still", directory=tmp_path / "vm2")
    assert again.state == "running"
    console = SerialConsole(tmp_path / "vm2/serial0.sock")
    assert console.command("audit").startswith("audit ok ")
    console.close()


def take_again(vm: RestoredVm, file: Path) -> None:
    """A snapshot of a restored VM."""
    with connect(vm.qmp_address) as machine:
        SnapshotJob(
            lambda control: take_snapshot(control, machine, LocalSink(file), SnapshotOptions())
        ).wait(60)


def test_a_vm_on_the_terminal(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    """-nographic and -daemonize belong to the first start only."""
    argv = machine_record(snapshot).argv
    at = argv.index("-chardev")
    argv = (*argv[:at], *argv[at + 4 :], "-nographic", "-serial", "mon:stdio", "-daemonize")
    file = rewrite_manifest(snapshot, tmp_path / "y.still", argv=argv)
    restored(file)
    console = SerialConsole(tmp_path / "vm/serial.sock")
    assert console.is_progressing()
    assert "tick" in (tmp_path / "vm/serial.log").read_text()
    console.close()


def test_it_goes_on_without_us(snapshot: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stillframe.restore.start import restore;"
        "print(restore(sys.argv[1], directory=Path(sys.argv[2]), program=sys.argv[3]).pid)"
    )
    words = [sys.executable, "-W", "error", "-c", code, str(snapshot), str(tmp_path / "vm")]
    done = subprocess.run(
        [*words, qemu_binary()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"PYTHONPATH": IMPORTED_FROM},
    )
    pid = int(done.stdout)
    try:
        assert done.stderr == ""
        console = SerialConsole(tmp_path / "vm/serial0.sock")
        assert console.is_progressing()
        console.close()
        assert os.getsid(pid) == pid
    finally:
        os.kill(pid, signal.SIGKILL)


def test_paused(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    new = restored(snapshot, paused=True)
    assert new.state == "paused"
    console = SerialConsole(tmp_path / "vm/serial0.sock")
    assert not console.is_progressing(0.5)
    qmp_execute(Path(new.qmp_address), "cont")
    assert console.is_progressing()
    console.close()


def test_a_paused_source_gives_a_paused_vm(
    restored: Restorer, source: GuestVm, tmp_path: Path
) -> None:
    with connect(str(source.qmp_path)) as machine:
        machine.stop()
    try:
        take(source, tmp_path / "p.still")
    finally:
        with connect(str(source.qmp_path)) as machine:
            machine.cont()
    assert restored(tmp_path / "p.still").state == "paused"


def test_own_socket_and_options(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    new = restored(
        snapshot, qmp_socket=str(tmp_path / "my.qmp"), extra_args=["-name", "second", "-smp", "1"]
    )
    assert qmp_execute(tmp_path / "my.qmp", "query-name") == {"name": "second"}
    assert new.qmp_address == str(tmp_path / "my.qmp")


def test_the_usual_places_are_private(
    restored: Restorer, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    new = restored(snapshot, directory=None)
    directory = Path(new.qmp_address).parent
    assert directory.parent == tmp_path / "stillframe"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert Path(new.log_path).stat().st_mode & 0o777 == 0o600


def test_an_imported_stream_with_own_options(restored: Restorer, tmp_path: Path) -> None:
    has_linux_guest().require()
    stream = tmp_path / "stream"
    with GuestVm("linux", ram_mib=RAM_MIB).start() as vm:
        # QEMU 7.2's live migration under TCG now and then misses a page; a stopped VM's does not.
        qmp_execute(vm.qmp_path, "stop")
        qmp_execute(vm.qmp_path, "migrate", {"uri": into_file(stream)})
        deadline = time.monotonic() + 60
        while qmp_execute(vm.qmp_path, "query-migrate").get("status") != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wait_until(stream.exists)
        argv = vm.command_line()[1:]
    with stream.open("rb") as raw:
        import_stream(raw, LocalSink(tmp_path / "i.still"), stillframe_version="0")
    for name in ("-qmp", "-chardev", "-serial"):
        at = argv.index(name)
        del argv[at : at + 2]
    with pytest.raises(UsageError, match="was imported"):
        restored(tmp_path / "i.still")
    serial = f"unix:{tmp_path}/s,server=on,wait=off"
    new = restored(tmp_path / "i.still", extra_args=[*argv, "-serial", serial])
    assert new.state == "paused"
    qmp_execute(Path(new.qmp_address), "cont")
    console = SerialConsole(tmp_path / "s")
    assert console.command("audit").startswith("audit ok ")
    console.close()


# Failures leave nothing behind


@pytest.mark.parametrize("how", ["wait", "stream"])
def test_a_damaged_frame(restored: Restorer, snapshot: Path, tmp_path: Path, how: str) -> None:
    with open_snapshot(snapshot) as opened:
        middle = opened.index.frame(opened.index.frame_count // 2)
    bad = tmp_path / "bad.still"
    shutil.copyfile(snapshot, bad)
    with bad.open("r+b") as file:
        file.seek(middle.offset_bytes + middle.stored_bytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=r"frame \d+ .*is damaged"):
        restored(bad, **{how: True})
    assert_nothing_left(tmp_path, "bad.still")


def test_another_machine_type(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    file = rewrite_manifest(snapshot, tmp_path / "y.still", machine_type="pc-q35-99.0")
    with pytest.raises(MachineError, match=r"exit code 1 while starting: .*unsupported machine"):
        restored(file)
    assert_nothing_left(tmp_path, "y.still")


def test_an_option_that_qemu_does_not_take(
    restored: Restorer, snapshot: Path, tmp_path: Path
) -> None:
    with pytest.raises(MachineError, match="no-such-device"):
        restored(snapshot, extra_args=["-device", "no-such-device"])
    assert_nothing_left(tmp_path)


def test_less_memory(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    own = [
        "-object",
        f"memory-backend-memfd,id=ram0,size={RAM_MIB // 2}M",
        "-m",
        f"{RAM_MIB // 2}M",
    ]
    with pytest.raises(MachineError, match=r"while loading the snapshot: .*ram0"):
        restored(snapshot, extra_args=own)
    assert_nothing_left(tmp_path)


def test_a_device_that_is_not_there(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"while loading the snapshot"):
        restored(snapshot, extra_args=["-M", "pc,memory-backend=ram0"])
    assert_nothing_left(tmp_path)


def test_a_missing_disk(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    file = with_options(snapshot, tmp_path / "y.still", "-drive", "file=/nowhere/d,if=virtio")
    with pytest.raises(NotFoundError, match="there is no /nowhere/d"):
        restored(file)
    assert_nothing_left(tmp_path, "y.still")


def test_a_disk_that_is_no_image(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(b"no image")
    drive = f"file={tmp_path}/d,if=virtio,format=qcow2"
    file = with_options(snapshot, tmp_path / "y.still", "-drive", drive)
    with pytest.raises(HostError, match=r"cannot read the disk .*/d: .*not in qcow2 format"):
        restored(file)
    assert_nothing_left(tmp_path, "y.still", "d")


def test_a_socket_that_is_taken(restored: Restorer, snapshot: Path, source: GuestVm) -> None:
    with pytest.raises(BusyError, match="somebody listens on"):
        restored(snapshot, qmp_socket=str(source.qmp_path))
    assert qmp_execute(source.qmp_path, "query-status")["status"] == "running"


@pytest.mark.parametrize("how", ["wait", "stream"])
def test_an_interruption(snapshot: Path, restored: Restorer, tmp_path: Path, how: str) -> None:

    def interrupt(sent: int, _total: int) -> None:
        if sent > 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restored(snapshot, on_progress=interrupt, **{how: True})
    assert_nothing_left(tmp_path)


def test_qemu_killed_while_loading(snapshot: Path, restored: Restorer, tmp_path: Path) -> None:

    def kill(sent: int, _total: int) -> None:
        for pid in emulators(tmp_path):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(MachineError, match="QEMU ended by signal 9 while loading the snapshot"):
        restored(snapshot, on_progress=kill, stream=True)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("how", ["stream", "wait"])
def test_killed_before_the_stream(snapshot: Path, tmp_path: Path, how: str) -> None:
    """The new QEMU waits for its stream: it must see that nobody is left to send it."""
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from stillframe.restore import start;"
        "start.Restoring._inspect = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "start.restore(sys.argv[1], directory=Path(sys.argv[2]), program=sys.argv[3],"
        f" {how}=True)"
    )
    words = [sys.executable, "-c", code, str(snapshot), str(tmp_path / "vm"), qemu_binary()]
    done = subprocess.run(
        words, timeout=120, check=False, env=os.environ | {"PYTHONPATH": IMPORTED_FROM}
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while emulators(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = emulators(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("after_bytes", [0, 4 << 20])
def test_killed_in_the_middle(snapshot: Path, tmp_path: Path, after_bytes: int) -> None:
    """The new QEMU must not wait for the rest of its stream for ever."""
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from stillframe.restore.start import restore;"
        "restore(sys.argv[1], directory=Path(sys.argv[2]), program=sys.argv[3], stream=True,"
        " on_progress=lambda sent, _:"
        " sent > int(sys.argv[4]) and os.kill(os.getpid(), signal.SIGKILL))"
    )
    words = [sys.executable, "-c", code, str(snapshot), str(tmp_path / "vm"), qemu_binary()]
    done = subprocess.run(
        [*words, str(after_bytes)],
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": IMPORTED_FROM},
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while emulators(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not emulators(tmp_path)


# Hostile command lines


@pytest.mark.parametrize(
    "options",
    [
        ["-netdev", "tap,id=x,script=EVIL,downscript=EVIL"],
        ["-netdev", "bridge,id=x,helper=EVIL"],
        ["-incoming", "exec:EVIL"],
        ["-name", "x; EVIL; $(EVIL) `EVIL`"],
        ["-append", "'; EVIL #"],
        ["-serial", "pipe:EVIL"],
        ["-pidfile", "TARGET"],
        ["-chardev", "file,id=x,path=TARGET", "-device", "isa-serial,chardev=x"],
        ["-serial", "file:TARGET"],
        ["-D", "TARGET", "-d", "guest_errors"],
        ["-object", "memory-backend-file,id=x,size=1M,share=on,mem-path=TARGET"],
        ["-device", "piix3-usb-uhci,id=u", "-device", "usb-tablet,bus=u.0,pcap=TARGET"],
    ],
    ids=" ".join,
)
def test_hostile_options_do_nothing(
    restored: Restorer, snapshot: Path, tmp_path: Path, options: list[str]
) -> None:
    """Whether the VM starts or not: no program runs, and no file is written."""
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    evil.chmod(0o755)
    target = tmp_path / "target"
    target.write_text("precious")
    words = [w.replace("EVIL", str(evil)).replace("TARGET", str(target)) for w in options]
    file = with_options(snapshot, tmp_path / "y.still", *words)
    started = True
    try:
        restored(file)
    except (MachineError, HostError):
        started = False
    assert not (tmp_path / "was-run").exists()
    assert target.read_text() == "precious"
    if not started:
        assert not emulators(tmp_path)
        assert not (tmp_path / "vm").exists()


def test_the_recorded_path_is_not_run(restored: Restorer, snapshot: Path, tmp_path: Path) -> None:
    evil = tmp_path / "qemu-system-x86_64"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    evil.chmod(0o755)
    argv = (str(evil), *machine_record(snapshot).argv[1:])
    file = rewrite_manifest(snapshot, tmp_path / "y.still", executable=str(evil), argv=argv)
    with contextlib.suppress(HostError, MachineError):
        restored(file, program=None)
    assert not (tmp_path / "was-run").exists()


def test_several_at_once(snapshot: Path, restored: Restorer, tmp_path: Path) -> None:
    """From threads, as a service would."""
    new: list[RestoredVm] = []

    def one(number: int) -> None:
        new.append(restored(snapshot, directory=tmp_path / f"vm{number}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [vm.state for vm in new] == ["running", "running"]
