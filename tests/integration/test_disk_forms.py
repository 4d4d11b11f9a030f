"""Every form of a QEMU's disk: captured, or refused by name with a remedy that works.

The VM has no guest, so that disk and copy are equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillframe import api
from stillframe.errors import RefusedError
from stillframe.model import CapturedDisk
from tests.support.bare_vm import BareVm
from tests.support.journal_vm import captured_path, digest, manifest_of, qemu_img
from tests.support.listening import wait_listening
from tests.support.probes import has_uffd_wp
from tests.support.small_file_system import mounted_tmpfs
from tests.support.surveyed import surveyed
from tests.support.taking import PATIENT_MS
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SIZE = 8 << 20
SECRET = ["-object", "secret,id=key,data=geheim"]
LUKS = ["--object", "secret,id=key,data=geheim", "-o"]


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def raw_disk(path: Path) -> Path:
    path.write_bytes(os.urandom(SIZE // 4) + bytes(SIZE - SIZE // 4))
    return path


def qcow2_disk(path: Path) -> Path:
    raw = raw_disk(path.with_suffix(".tmp"))
    qemu_img("convert", "-O", "qcow2", raw, path)
    raw.unlink()
    return path


def capture(vm: BareVm, directory: Path, kind: str) -> tuple[CapturedDisk, ...]:
    file = directory / f"{kind}.still"
    file.unlink(missing_ok=True)
    api.take(vm.qmp, file, disks=kind, max_drain_ms=PATIENT_MS).wait(60)  # type: ignore[arg-type]
    return manifest_of(file).captured_disks


def assert_captured(vm: BareVm, directory: Path, disk: Path | str, *kinds: str) -> None:
    for kind in kinds:
        (captured,) = capture(vm, directory, kind)
        assert captured.kind == kind
        qemu_img("compare", "-U", disk, captured_path(directory / "x", captured))
        (directory / f"{kind}.still").unlink()
        api.commit(vm.qmp)
        assert captured.overlay == "" or not Path(captured.overlay).exists()


@pytest.mark.parametrize(
    "words",
    [
        ["-hda", "disk.raw"],
        ["-drive", "file=disk.raw,if=virtio,format=raw"],
        ["-drive", "file=disk.raw,if=virtio,format=raw,cache=none"],
        ["-drive", "file=disk.raw,if=virtio,format=raw,throttling.iops-total=50"],
        ["-drive", "file=disk.raw,if=virtio,format=raw,copy-on-read=on"],
        [
            *("-object", "throttle-group,id=tg,x-iops-total=50"),
            *("-blockdev", "raw,node-name=r,file.driver=file,file.filename=disk.raw"),
            *("-blockdev", "throttle,node-name=t,throttle-group=tg,file=r"),
            *("-device", "virtio-blk-pci,drive=t,id=vt"),
        ],
    ],
    ids=["hda", "drive", "cache-none", "limited", "copy-on-read", "throttle-node"],
)
def test_raw_files(tmp_path: Path, words: list[str]) -> None:
    """Relative names, as most people give them; without node names, or below a filter."""
    disk = raw_disk(tmp_path / "disk.raw")
    with BareVm(*words, cwd=tmp_path) as vm:
        assert_captured(vm, tmp_path, disk, "copy", "overlay")


def test_replacing_a_snapshot_replaces_its_copies(tmp_path: Path) -> None:
    disk, file = raw_disk(tmp_path / "disk.raw"), tmp_path / "x.still"
    with BareVm("-drive", f"file={disk},if=virtio,format=raw") as vm:
        for _ in range(2):
            api.take(vm.qmp, file, overwrite=True, max_drain_ms=PATIENT_MS).wait(60)
            (captured,) = manifest_of(file).captured_disks
            copies = list((tmp_path / "x.still.disks").iterdir())
            assert copies == [captured_path(file, captured)]


def test_commit_leaves_what_a_snapshot_needs(tmp_path: Path) -> None:
    disk, file = raw_disk(tmp_path / "disk.raw"), tmp_path / "x.still"
    was = digest(disk)
    with BareVm("-drive", f"file={disk},if=virtio,format=raw,id=d") as vm:
        api.take(vm.qmp, file, disks="overlay", max_drain_ms=PATIENT_MS).wait(60)
        with api.connect(vm.second_qmp) as other:
            other.qmp.hmp('qemu-io d "write -P 0x77 0 1M"')
        (kept,) = api.commit(vm.qmp)
        assert (kept.overlays, kept.needed_by) == ((), (str(file),))
        assert digest(disk) == was
        file.unlink()
        (folded,) = api.commit(vm.qmp)
        assert len(folded.overlays) == 1
    assert disk.read_bytes().startswith(b"\x77" * 512)


def test_a_dry_run_of_commit_folds_nothing(tmp_path: Path) -> None:
    disk, file = raw_disk(tmp_path / "disk.raw"), tmp_path / "x.still"
    with BareVm("-drive", f"file={disk},if=virtio,format=raw,id=d") as vm:
        api.take(vm.qmp, file, disks="overlay", max_drain_ms=PATIENT_MS).wait(60)
        overlay = Path(manifest_of(file).captured_disks[0].overlay)
        words = [sys.executable, "-m", "stillframe", "commit", vm.qmp, "--dry-run"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "stays as it is" in said
        assert str(file) in said
        file.unlink()
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "would be folded" in said
        (would,) = api.commit(vm.qmp, dry_run=True)
        assert would.overlays == (str(overlay),)
        assert overlay.exists()
        (folded,) = api.commit(vm.qmp)
        assert folded.overlays == would.overlays
        assert not overlay.exists()


def test_a_chain(tmp_path: Path) -> None:
    base, top = qcow2_disk(tmp_path / "base"), tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    words = ["-blockdev", f"qcow2,node-name=n,file.driver=file,file.filename={top}"]
    with BareVm(*words, "-device", "virtio-blk-pci,drive=n") as vm:
        assert_captured(vm, tmp_path, top, "copy", "overlay")
        (captured,) = capture(vm, tmp_path, "overlay")
        assert [file.path for file in captured.files] == ["top", "base"]


def test_readonly_and_empty_drives_are_left_alone(tmp_path: Path) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    words = ["-drive", f"file={disk},if=virtio,format=raw,readonly=on"]
    with BareVm(*words, "-drive", "if=ide,media=cdrom") as vm:
        for kind in ("copy", "overlay", "none"):
            assert capture(vm, tmp_path, kind) == ()
            assert manifest_of(tmp_path / f"{kind}.still").without_disks == ()


def test_firmware_variables_are_copied_in_either_mode(tmp_path: Path) -> None:
    code, variables = tmp_path / "code", tmp_path / "vars"
    code.write_bytes(os.urandom(1 << 20))
    variables.write_bytes(os.urandom(1 << 19))
    words = ["-drive", f"if=pflash,format=raw,readonly=on,file={code}"]
    with BareVm(*words, "-drive", f"if=pflash,format=raw,file={variables}") as vm:
        for kind in ("copy", "overlay"):
            (captured,) = capture(vm, tmp_path, kind)
            assert captured.kind == "copy"
            qemu_img("compare", "-U", "-f", "raw", "-F", "qcow2", variables,
                     captured_path(tmp_path / "x", captured))  # fmt: skip


def test_a_luks_disk_is_copied_as_ciphertext(tmp_path: Path) -> None:
    disk = tmp_path / "disk.luks"
    qemu_img(
        "create",
        "-q",
        "-f",
        "luks",
        *LUKS,
        "key-secret=key,iter-time=10,hash-alg=sha512",
        disk,
        SIZE,
    )
    words = ["-blockdev", f"luks,node-name=n,key-secret=key,file.driver=file,file.filename={disk}"]
    with BareVm(*SECRET, *words, "-device", "virtio-blk-pci,drive=n") as vm:
        (captured,) = capture(vm, tmp_path, "copy")
        assert captured.files[0].format == "luks"
        assert captured_path(tmp_path / "x", captured).read_bytes() == disk.read_bytes()
        with pytest.raises(RefusedError, match=r"encrypted-disk.*--disks copy"):
            capture(vm, tmp_path, "overlay")


def test_an_encrypted_qcow2_is_left_out_and_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    options = (
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.hash-alg=sha512"
    )
    qemu_img("create", "-q", "-f", "qcow2", *LUKS, options, disk, SIZE)
    words = "qcow2,node-name=n,encrypt.format=luks,encrypt.key-secret=key,file.driver=file"
    words += f",file.filename={disk}"
    with BareVm(*SECRET, "-blockdev", words, "-device", "virtio-blk-pci,drive=n,id=v0") as vm:
        taken = api.take(vm.qmp, tmp_path / "x.still", max_drain_ms=PATIENT_MS).wait(60)
        manifest = manifest_of(tmp_path / "x.still")
        assert manifest.without_disks == ("v0",)
        assert manifest.captured_disks == ()
        assert any("without v0" in note and "plain text" in note for note in taken.notes)
        with pytest.raises(RefusedError, match=r"encrypted-disk.*v0.*--disks none"):
            capture(vm, tmp_path, "overlay")


def test_snapshot_on_is_copied(tmp_path: Path) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    with BareVm("-drive", f"file={disk},if=virtio,format=raw,snapshot=on") as vm:
        assert_captured(vm, tmp_path, disk, "copy")
        with pytest.raises(RefusedError, match=r"temporary-disk.*--disks copy"):
            capture(vm, tmp_path, "overlay")


def test_a_network_disk_is_copied(tmp_path: Path, stack: ExitStack) -> None:
    disk, socket = raw_disk(tmp_path / "disk.raw"), tmp_path / "nbd"
    command = ["qemu-nbd", "-t", "-e", "4", "-k", str(socket), "-f", "raw", str(disk)]
    server = subprocess.Popen(command)
    stack.callback(server.wait)
    stack.callback(server.kill)
    wait_listening(socket, alive=lambda: server.poll() is None)
    with BareVm("-drive", f"file=nbd+unix:///?socket={socket},if=virtio,format=raw") as vm:
        (captured,) = capture(vm, tmp_path, "copy")
        qemu_img("compare", "-U", disk, captured_path(tmp_path / "x", captured))
        with pytest.raises(RefusedError, match=r"remote-disk.*--disks copy"):
            capture(vm, tmp_path, "overlay")


def test_a_block_device(tmp_path: Path, stack: ExitStack) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    done = subprocess.run(
        ["losetup", "-f", "--show", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("missing loop-device: losetup cannot make one here")
    device = done.stdout.strip()
    stack.callback(subprocess.run, ["losetup", "-d", device], check=False)
    with BareVm("-drive", f"file={device},if=virtio,format=raw") as vm:
        assert_captured(vm, tmp_path, device, "copy", "overlay")


def test_somebody_elses_block_job_is_named(tmp_path: Path) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    with BareVm("-drive", f"file={disk},if=virtio,format=raw,id=d") as vm:
        with api.connect(vm.second_qmp) as machine:
            target = {"device": "d", "target": str(tmp_path / "m"), "sync": "full", "speed": 1}
            machine.qmp.execute("drive-mirror", {**target, "job-id": "theirs"})
        for kind in ("copy", "overlay"):
            with pytest.raises(RefusedError, match=r"block-job.*theirs.*mirror"):
                capture(vm, tmp_path, kind)
        assert capture(vm, tmp_path, "none") == ()


def test_no_room_for_the_copy(tmp_path: Path, stack: ExitStack) -> None:
    from stillframe.errors import SinkError

    small = stack.enter_context(mounted_tmpfs(tmp_path / "small", f"size={2 << 20}"))
    disk = raw_disk(tmp_path / "disk.raw")
    with BareVm("-drive", f"file={disk},if=virtio,format=raw,id=d") as vm:
        with pytest.raises(SinkError, match=r"no room for the copy of disk d.*--disks-dir"):
            api.take(vm.qmp, tmp_path / "x.still", disks_directory=small / "copies").wait(60)
        assert list(small.iterdir()) == []
        assert not (tmp_path / "x.still").exists()


def test_the_vm_may_stand_still_throughout(tmp_path: Path) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    with BareVm("-drive", f"file={disk},if=virtio,format=raw") as vm:
        for kind in ("copy", "overlay"):
            file = tmp_path / f"{kind}.still"
            api.take(vm.qmp, file, mode="stop", disks=kind).wait(60)
            (captured,) = manifest_of(file).captured_disks
            qemu_img("compare", "-U", disk, captured_path(file, captured))
        with api.connect(vm.qmp) as machine:
            assert machine.status() == "running"


def test_an_agent_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    channel = ["-chardev", f"socket,id=c,path={tmp_path}/qga,server=on,wait=off"]
    channel += ["-device", "virtio-serial"]
    port = ["-device", "virtserialport,chardev=c,name=org.qemu.guest_agent.0"]
    for words, name in (([], "no-guest-agent"), ([*channel, *port], "guest-agent-silent")):
        with BareVm(*words) as vm:
            with pytest.raises(RefusedError, match=name):
                api.take(vm.qmp, tmp_path / "x.still", quiesce=True).wait(60)
            with api.connect(vm.qmp) as machine:
                assert machine.status() == "running"


def test_ps_says_where_the_disks_must_be_left_out(tmp_path: Path, stack: ExitStack) -> None:
    key = ["--object", "secret,id=key,data=geheim"]
    disk = tmp_path / "secret.qcow2"
    options = (
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.hash-alg=sha512"
    )
    qemu_img("create", "-q", *key, "-f", "qcow2", "-o", options, disk, SIZE)
    drive = f"file={disk},format=qcow2,if=virtio,encrypt.key-secret=key"
    encrypted = stack.enter_context(BareVm(*SECRET, "-drive", drive, name="sf-encrypted"))
    plain = raw_disk(tmp_path / "disk.raw")
    stack.enter_context(BareVm("-drive", f"file={plain},format=raw,if=virtio", name="sf-plain"))
    seen = {name: surveyed(name) for name in ("sf-encrypted", "sf-plain")}
    assert seen["sf-encrypted"].without_disks
    assert any("without disk" in reason for reason in seen["sf-encrypted"].reasons)
    assert not seen["sf-plain"].without_disks
    if seen["sf-encrypted"].snapshotable:
        words = [sys.executable, "-m", "stillframe", "ps"]

        def says_so() -> bool:  # unless its monitor did not answer in time
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            return "yes, without disks" in done.stdout

        wait_until(says_so)
    assert encrypted.pid == seen["sf-encrypted"].pid
