"""Files from elsewhere, restored by a real QEMU: nothing is touched without --trust."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from guests.qemu import qemu_binary
from stillframe import api
from stillframe.errors import MachineError, RefusedError, StillframeError, TrustError
from stillframe.restore.plan import check_plan
from stillframe.still.host_mark import NO_MARK, HostKey
from stillframe.store import open_snapshot
from tests.support.probes import has_qemu
from tests.support.restoring import SMALL, Restores, edited, hmp

pytestmark = pytest.mark.qemu

_OPENED = re.compile(
    r'(?:openat\([^,]+|open\(|creat\(|execve\(|truncate\(|unlink\(|rename\()[^"]*"([^"]+)"(.*)'
)
_CONNECTED = re.compile(r'connect\(.*sun_path="([^"]+)"')


@pytest.fixture
def restores(tmp_path: Path) -> Iterator[Restores]:
    has_qemu().require()
    made = Restores(tmp_path)
    yield made
    made.close()


@pytest.fixture
def snapshot(restores: Restores) -> Path:
    return restores.taken(*SMALL)


# The mark


def test_a_snapshot_taken_here_says_so(snapshot: Path, tmp_path: Path) -> None:
    with open_snapshot(snapshot) as opened:
        assert opened.was_taken_here
    key = Path(os.environ["XDG_STATE_HOME"]) / "stillframe/host.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with open_snapshot(edited(snapshot, tmp_path / "y.still", argv=["-S"])) as opened:
        assert not opened.was_taken_here


def test_a_mark_is_of_one_snapshot(snapshot: Path, tmp_path: Path) -> None:
    """Put into another manifest it says nothing; a copy of the file is the same snapshot."""
    with open_snapshot(shutil.copy(snapshot, tmp_path / "copy.still")) as opened:
        assert opened.was_taken_here
        mark = opened.manifest.mark

    class Forger(HostKey):
        def marked(self, index_digest: bytes, manifest: bytes) -> bytes:
            return manifest.replace(NO_MARK.encode(), mark.encode(), 1)

    forged = edited(snapshot, tmp_path / "y.still", argv=["-S"], key=Forger(bytes(32)))
    with open_snapshot(forged) as opened:
        assert opened.manifest.mark == mark
        assert not opened.was_taken_here


def test_what_is_marked_needs_no_trust_here_and_all_of_it_elsewhere(
    restores: Restores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    path = restores.taken(*SMALL, "-drive", f"file={tmp_path}/disk,format=raw,if=virtio")
    assert restores.restore(path).state == "running"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another-host"))
    with pytest.raises(TrustError, match=f"it reads {tmp_path}/x.still.disks/"):
        restores.restore(path)
    assert restores.restore(path, trust=True).state == "running"


# Hostile forms. HERE is the test's directory; "target" and "evil" are in it.

HOSTILE = {
    "nested node": ["-blockdev", json.dumps({
        "driver": "raw", "node-name": "top", "read-only": True,
        "file": {"driver": "file", "node-name": "q0", "read-only": False,
                 "filename": "HERE/target"},
    }), "-device", "virtio-blk-pci,drive=q0"],
    "dotted node": ["-blockdev", "driver=raw,node-name=top,read-only=on,file.driver=file,"
                    "file.node-name=q0,file.read-only=off,file.filename=HERE/target",
                    "-device", "virtio-blk-pci,drive=q0"],
    "backing node": ["-blockdev", json.dumps({
        "driver": "qcow2", "node-name": "top", "read-only": True,
        "file": {"driver": "file", "filename": "HERE/image"},
        "backing": {"driver": "file", "node-name": "q0", "read-only": False,
                    "filename": "HERE/target"},
    }), "-device", "virtio-blk-pci,drive=q0"],
    "json file name": ["-drive", "if=virtio,format=raw,file=json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": "HERE/target"}}
    ).replace(",", ",,")],
    "json in json": ["-drive", "if=virtio,file.filename=json:" + json.dumps(
        {"driver": "file", "filename": "HERE/target"}).replace(",", ",,")],
    "write log": ["-blockdev", json.dumps({
        "driver": "blklogwrites", "node-name": "w", "file": {"driver": "null-co"},
        "log": {"driver": "file", "filename": "HERE/target"}})],
    "debug rules": ["-drive", "if=virtio,file=blkdebug:HERE/target:HERE/image"],
    "verify": ["-drive", "if=virtio,file=blkverify:HERE/target:HERE/image"],
    "copy on read": ["-blockdev", "driver=copy-on-read,node-name=c,file.driver=file,"
                     "file.filename=HERE/target"],
    "writable directory": ["-drive", "if=virtio,file=fat:rw:HERE"],
    "memory file": ["-object", "memory-backend-file,id=m,size=1M,mem-path=HERE/new"],
    "growing memory": ["-object", "memory-backend-file,id=m,size=1M,mem-path=HERE/target"],
    "read-only memory": ["-object",
                         "memory-backend-file,id=m,size=4K,mem-path=HERE/target,readonly=on"],
    "memory path": ["-mem-path", "HERE/new"],
    "alsa": ["-audiodev", "alsa,id=a,out.dev=file:'|HERE/evil',,raw",
             "-device", "intel-hda", "-device", "hda-duplex,audiodev=a"],
    "alsa in": ["-audiodev", json.dumps({"driver": "alsa", "id": "a",
                                         "in": {"dev": "file:'|HERE/evil',raw"}}),
                "-device", "intel-hda", "-device", "hda-duplex,audiodev=a"],
    "sound file": ["-audiodev", "wav,id=a,path=HERE/new"],
    "oss": ["-audiodev", "oss,id=a,out.dev=HERE/target"],
    "guest forward": ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:HERE/evil"],
    "samba": ["-netdev", "user,id=n,smb=HERE"],
    "tap script": ["-netdev", "tap,id=n,script=HERE/evil,downscript=HERE/evil"],
    "helper": ["-netdev", "bridge,id=n,helper=HERE/evil"],
    "packet dump": ["-object", "filter-dump,id=f,netdev=n,file=HERE/new",
                    "-netdev", "user,id=n,restrict=on"],
    "usb dump": ["-device", "qemu-xhci", "-device", "usb-tablet,pcap=HERE/new"],
    "usb dump for all": ["-global", "usb-tablet.pcap=HERE/new", "-device", "qemu-xhci",
                         "-device", "usb-tablet"],
    "secret": ["-object", "secret,id=s,file=HERE/target"],
    "firmware config": ["-fw_cfg", "name=opt/x,file=HERE/target"],
    "option rom": ["-device", "e1000,romfile=HERE/target"],
    "option rom for all": ["-global", "e1000.romfile=HERE/target", "-device", "e1000"],
    "loader": ["-device", "loader,file=HERE/target,addr=0x100000,force-raw=on"],
    "shared directory": ["-virtfs", "local,path=HERE,mount_tag=m,security_model=none"],
    "media transfer": ["-device", "qemu-xhci", "-device", "usb-mtp,rootdir=HERE,readonly=off"],
    "serial pipe": ["-serial", "pipe:HERE/target"],
    "serial log": ["-chardev", "null,id=c,logfile=HERE/new"],
    "debug log": ["-D", "HERE/new", "-d", "guest_errors"],
    "trace": ["-trace", "enable=*,file=HERE/new"],
    "pid file": ["-pidfile", "HERE/new"],
    "plugin": ["-plugin", "HERE/evil"],
    "monitor socket": ["-qmp", "unix:HERE/new,server=on,wait=off"],
    "display bus": ["-display", "dbus,addr=unixexec:path=HERE/evil"],
    "input device": ["-object", "input-linux,id=i,evdev=HERE/target"],
    "dumped tree": ["-M", "q35,dumpdtb=HERE/new"],
    "firmware": ["-bios", "HERE/target"],
    "relative": ["-kernel", "target"],
    "upwards": ["-kernel", "/usr/share/qemu/../../..HERE/target"],
    "by the working directory": ["-kernel", "/proc/self/cwd/target"],
    "by a link": ["-kernel", "HERE/link"],
    "backing file": ["-drive", "if=virtio,format=qcow2,file=HERE/backed"],
    "backing file of a node": ["-blockdev", "driver=qcow2,node-name=q,file.driver=file,"
                               "file.filename=HERE/backed", "-device", "virtio-blk-pci,drive=q"],
    "probed backing file": ["-hda", "HERE/backed"],
    "read-only backing file": ["-cdrom", "HERE/backed"],
    "deep backing file": ["-drive", "if=virtio,file=HERE/deep"],
    "data file": ["-drive", "if=virtio,format=qcow2,file=HERE/outside"],
    "extent": ["-drive", "if=virtio,format=vmdk,file=HERE/descriptor"],
    "rom beside": ["-device", "e1000"],
    "rom of a name": ["-device", "e1000,romfile=target"],
    "global of two forms": ["-global", "e1000.romfile=HERE/target,property=x,driver=y",
                            "-device", "e1000"],
    "graphics memory": ["-device", "virtio-gpu-pci,blob=on"],
    "accelerator": ["-accel", "tcg,device=HERE/target"],
    "acpi table": ["-acpitable", "data=HERE/target"],
    "keyboard": ["-k", "HERE/target", "-vnc", "unix:HERE/new"],
    "spice port": ["-chardev", "spiceport,id=s,name=x,logfile=HERE/new",
                   "-device", "isa-serial,chardev=s"],
    "serial udp": ["-serial", "udp:127.0.0.1:9@:0"],
    "tpm": ["-tpmdev", "passthrough,id=t,path=HERE/target,cancel-path=HERE/target"],
    "semihosting": ["-semihosting-config", "enable=on,target=native,chardev=c"],
    "tftp": ["-netdev", "user,id=n,restrict=on,tftp=HERE,bootfile=target"],
    "option rom of a name": ["-option-rom", "target"],
    "rng": ["-object", "rng-random,id=r,filename=HERE/target"],
    "keys": ["-object", "tls-creds-psk,id=t,dir=HERE,endpoint=server"],
    "list": ["-object", "authz-list-file,id=a,filename=HERE/target"],
    "written configuration": ["-writeconfig", "HERE/new"],
    "read configuration": ["-readconfig", "HERE/target"],
    "set": ["-device", "e1000,id=e", "-set", "device.e.romfile=HERE/target"],
    "jail": ["-chroot", "HERE"],
    "dumped state": ["-dump-vmstate", "HERE/new"],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_touched_without_trust(
    restores: Restores, snapshot: Path, tmp_path: Path, name: str
) -> None:
    """Whether it is refused, asks for trust, or starts: no file is opened, no program run."""
    seen = strace_of_restore(restores, snapshot, tmp_path, name, here=False)
    assert_untouched(tmp_path)
    assert not [line for line in seen if str(tmp_path / "target") in line]
    assert not [line for line in seen if str(tmp_path / "evil") in line]


RUN_PROGRAMS = ("alsa", "alsa in", "plugin", "display bus", "guest forward")
"""On a VM's own host these do what they say: they run the VM's program."""


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in RUN_PROGRAMS])
def test_what_is_touched_is_in_the_plan(
    restores: Restores, snapshot: Path, tmp_path: Path, name: str
) -> None:
    """The same on a VM's own host, where no trust is asked for: the ledger has all of it, and no
    disk of the first VM is opened for writing."""
    seen = strace_of_restore(restores, snapshot, tmp_path, name, here=True)
    path = tmp_path / "y.still"
    with open_snapshot(path) as opened:
        plan = api.plan_restore(path, program=qemu_binary())
        assert opened.was_taken_here
    listed = {touch.target for touch in plan.touches}
    for line in seen:
        match = _OPENED.search(line) or _CONNECTED.search(line)
        if match is None or not match[1].startswith(str(tmp_path)) or "= -1" in line:
            continue
        inside = match[1].startswith(str(tmp_path / "vm"))
        assert inside or match[1] in listed, line
        writes = any(flag in line for flag in ("O_RDWR", "O_WRONLY", "O_CREAT"))
        assert inside or not writes or ("write", match[1]) in {
            (touch.access, touch.target) for touch in plan.touches
        }, line  # fmt: skip


def strace_of_restore(
    restores: Restores, snapshot: Path, tmp_path: Path, name: str, *, here: bool
) -> list[str]:
    """The system calls of a restore's QEMU that name files, if it came to that."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("missing strace")
    (tmp_path / "target").write_bytes(b"precious".ljust(4096, b"\0"))
    (tmp_path / "target").chmod(0o600)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "image"), "4096"]
    subprocess.run(create, check=True)
    make_images(tmp_path)
    if name == "rom beside":  # QEMU looks in its working directory first
        (tmp_path / "efi-e1000.rom").write_bytes(bytes(4096))
    (tmp_path / "evil").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "evil").chmod(0o755)
    argv = [word.replace("HERE", str(tmp_path)) for word in HOSTILE[name]]
    path = edited(snapshot, tmp_path / "y.still", argv=argv, cwd=str(tmp_path), here=here)
    program = tmp_path / "traced-qemu"
    log = tmp_path / "strace.log"
    calls = "openat,open,creat,connect,execve,truncate,unlink,rename"
    # A tracee outlives a strace that is killed; this one ends with it, and strace with the test.
    mortal = "setpriv --pdeathsig KILL"
    traced = f"{strace} -f -qq -o {log} -e trace={calls} {mortal} {qemu_binary()}"
    program.write_text(f'#!/bin/sh\nexec {mortal} {traced} "$@"\n')
    program.chmod(0o755)
    try:
        restores.restore(path, program=str(program))
    except StillframeError as error:
        if not isinstance(error, MachineError) and log.exists():
            raise
    words = log.read_text().splitlines() if log.exists() else []
    whole = partial(re.compile(r'"(?!\.")(?=[^/"])').sub, f'"{tmp_path}/', count=1)
    return [whole(line) if _OPENED.search(line) else line
            for line in words if "traced-qemu" not in line]  # fmt: skip


def make_images(here: Path) -> None:
    """Disk images whose headers name ``target``, which is as good as a raw image."""
    (here / "link").symlink_to("target")
    options = {
        "backed": ["-f", "qcow2", "-b", f"{here}/target", "-F", "raw"],
        "deep": ["-f", "qcow2", "-b", "backed", "-F", "qcow2"],  # relative to the image
    }
    for name, words in options.items():
        subprocess.run(["qemu-img", "create", "-q", *words, f"{here}/{name}"], check=True)
    other = here / "data"
    words = ["-f", "qcow2", "-o", f"data_file={other},data_file_raw=on", f"{here}/outside"]
    subprocess.run(["qemu-img", "create", "-q", *words, "4096"], check=True)
    other.unlink()
    data = (here / "outside").read_bytes().replace(bytes(other), bytes(other.with_name("evil")))
    (here / "outside").write_bytes(data)
    (here / "descriptor").write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        'createType="monolithicFlat"\nRW 8 FLAT "target" 0\n'
    )


def assert_untouched(here: Path) -> None:
    assert (here / "target").read_bytes() == b"precious".ljust(4096, b"\0")
    assert not (here / "was-run").exists()
    assert not (here / "new").exists()


# Reading a plan


def test_a_dry_run_opens_nothing(snapshot: Path, tmp_path: Path) -> None:
    """A FIFO's writer would be let go by an open, and a watchdog started."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    released = threading.Event()

    def write() -> None:
        os.close(os.open(fifo, os.O_WRONLY))
        released.set()

    threading.Thread(target=write, daemon=True).start()
    time.sleep(0.1)
    options = [
        ["-drive", f"if=virtio,format=raw,file={fifo}"],
        ["-drive", f"if=virtio,media=cdrom,file={fifo}"],
        ["-cdrom", str(fifo)],
        ["-blockdev", f"driver=file,node-name=d,filename={fifo}"],
        ["-object", f"memory-backend-file,id=m,size=1M,share=on,mem-path={fifo}"],
        ["-mem-path", str(fifo)],
        ["-kernel", str(fifo), "-initrd", str(fifo), "-dtb", str(fifo), "-bios", str(fifo)],
        ["-fw_cfg", f"name=opt/x,file={fifo}", "-L", str(fifo), "-k", str(fifo)],
        ["-device", f"loader,file={fifo}", "-object", f"secret,id=s,file={fifo}"],
        ["-chardev", f"pipe,id=c,path={fifo}", "-serial", f"pipe:{fifo}"],
        ["-virtfs", f"local,path={fifo},mount_tag=m,security_model=none", "-plugin", str(fifo)],
    ]
    for argv in options:
        path = edited(snapshot, tmp_path / "y.still", argv=argv, cwd=str(tmp_path))
        plan = api.plan_restore(path, program=qemu_binary())
        assert list(api.plan_lines(plan))
        with pytest.raises(TrustError) if plan.needs_trust else pytest.raises(RefusedError):
            check_plan(plan, trust=False)
            raise RefusedError("nothing to be seen")
    assert not released.is_set()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert released.wait(60), "the writer waited all the time"
    os.close(reader)


# Whose VM it was


@pytest.mark.skipif(os.geteuid() != 0, reason="missing root: only root restores another user's VM")
def test_another_users_vm_runs_as_that_user(
    restores: Restores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    os.chmod(tmp_path / "disk", 0o644)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    path = restores.taken(*SMALL, "-drive", f"file={tmp_path}/disk,format=raw,if=virtio")
    path = edited(path, tmp_path / "y.still", here=True, uid=65534)
    vm = restores.restore(path, directory=None)
    assert vm.state == "running"
    status = Path(f"/proc/{vm.pid}/status").read_text()
    assert re.search(r"Uid:\t65534\t65534\t65534\t65534", status)
    assert re.search(r"Groups:\t *\n", status)
    assert Path(vm.directory).stat().st_uid == 65534
    assert vm.disk_directory is not None
    assert (Path(vm.disk_directory) / "disk0.qcow2").stat().st_uid == 65534
    assert stat.S_IMODE(Path(vm.directory).stat().st_mode) == 0o700
    hmp(vm, "quit")
    shutil.rmtree(vm.disk_directory)


def test_roots_vm_is_no_business_of_others(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(snapshot, tmp_path / "y.still", here=True, uid=4711)
    monkeypatch.setattr(os, "geteuid", lambda: 4712)
    plan = api.plan_restore(path, program=qemu_binary(), extra_args=[])
    assert any("its VM ran as user 4711" in reason for reason in plan.needs_trust)
