"""Setups that people have, restored by a real QEMU; and the remedies that a refusal names."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from guests.monitor import qmp_execute
from stillframe.errors import MachineError, NotFoundError, RefusedError, UsageError
from stillframe.image import start as start_module
from stillframe.restore.start import RestoredVm
from stillframe.store import open_snapshot
from tests.support.journal_vm import qemu_img
from tests.support.listening import wait_listening
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_qemu
from tests.support.restoring import SMALL, Restores, edited, hmp

pytestmark = pytest.mark.qemu


@pytest.fixture
def restores(tmp_path: Path) -> Iterator[Restores]:
    has_qemu().require()
    made = Restores(tmp_path)
    yield made
    made.close()


def image(path: Path, *options: str, size: str = "8M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), size], check=True)
    return path


def changed(path: Path, before: str, after: str) -> Path:
    """A copy whose recorded command line says something else, as if taken here."""
    with open_snapshot(path) as opened:
        record = opened.manifest.machine
    assert record is not None
    words = [word.replace(before, after) for word in record.argv]
    assert words != list(record.argv)
    return edited(path, path.with_suffix(".other.still"), here=True, replaced=words)


# USB redirection, as virt-manager, GNOME Boxes and quickemu give to every VM


@pytest.mark.parametrize("identity", [",id=redir0", ""])
def test_usb_redirection(restores: Restores, identity: str) -> None:
    spice = "port=0,disable-ticketing=on"
    path = restores.taken(
        *SMALL, "-device", "qemu-xhci", "-spice", spice, "-chardev", "spicevmc,id=r,name=usbredir",
        "-device", f"usb-redir,chardev=r{identity}",
    )  # fmt: skip
    vm = restores.restore(path)
    assert vm.state == "running"
    assert "USB Redirection" in hmp(vm, "info usb") or "usb-redir" in hmp(vm, "info qtree")
    assert any("redirected over USB" in note for note in vm.notes)


# Secrets and disks


def test_the_master_key_of_a_domain_that_ended(restores: Restores, tmp_path: Path) -> None:
    key = tmp_path / "master-key.aes"
    key.write_bytes(bytes(range(32)))
    secret = f'{{"qom-type":"secret","id":"masterKey0","format":"raw","file":"{key}"}}'
    path = restores.taken(*SMALL, "-object", secret)
    assert restores.restore(path).state == "running"
    key.unlink()
    vm = restores.restore(path)
    assert vm.state == "running"
    assert any("master key" in note for note in vm.notes)


@pytest.mark.parametrize("how", ["drive", "blockdev", "luks drive"])
def test_an_encrypted_disk(restores: Restores, tmp_path: Path, how: str) -> None:
    (tmp_path / "pw").write_text("s1")
    secret = f"secret,id=s0,file={tmp_path}/pw"
    qcow2 = how != "luks drive"
    key, kind = ("encrypt.key-secret=s0", "qcow2") if qcow2 else ("key-secret=s0", "luks")
    options = f"{key},iter-time=10,hash-alg=sha512"
    if qcow2:
        options = f"encrypt.format=luks,{key},encrypt.iter-time=10,encrypt.hash-alg=sha512"
    qemu_img("create", "-q", "--object", secret, "-f", kind, "-o", options, tmp_path / "d", "8M")
    if how == "blockdev":
        disk = ["-blockdev", f"driver=qcow2,node-name=d,encrypt.format=luks,{key},file.driver=file,"
                f"file.filename={tmp_path}/d", "-device", "virtio-blk-pci,drive=d"]  # fmt: skip
    else:
        disk = ["-drive", f"file={tmp_path}/d,format={kind},if=virtio,{key}"]
    path = restores.taken(*SMALL, "-object", secret, *disk, disks="none" if qcow2 else "copy")
    vm = restores.restore(path)
    assert vm.state == "running"
    assert "disk0.qcow2" in hmp(vm, "info block")
    assert "wrote 512/512" in io_of(vm, "write -P 0x41 0 512")


def io_of(vm: RestoredVm, command: str) -> str:
    """What qemu-io says of the first disk of a VM; QEMU prints it into its log."""
    blocks = qmp_execute(Path(vm.qmp_address), "query-block")
    (qdev,) = [block["qdev"] for block in blocks if block.get("inserted")]
    return hmp(vm, f'qemu-io -d {qdev} "{command}"') + Path(vm.log_path).read_text()


@pytest.mark.parametrize("how", ["blockdev", "drive", "url"])
def test_a_network_block_device(restores: Restores, tmp_path: Path, how: str) -> None:
    raw = tmp_path / "n.raw"
    raw.write_bytes(b"\x55" * (1 << 20))
    address = tmp_path / "nbd"
    server = subprocess.Popen(
        ["qemu-nbd", "-t", "-e", "8", "--shared=8", "-f", "raw", "-k", str(address), str(raw)]
    )
    try:
        wait_listening(address, alive=lambda: server.poll() is None)
        disk = {
            "blockdev": ["-blockdev", "driver=nbd,server.type=unix,node-name=n0,"
                         f"server.path={address}", "-device", "virtio-blk-pci,drive=n0"],
            "drive": ["-drive", "if=virtio,driver=raw,file.driver=nbd,file.server.type=unix,"
                      f"file.server.path={address}"],
            "url": ["-drive", f"if=virtio,format=raw,file=nbd+unix:///?socket={address}"],
        }[how]  # fmt: skip
        path = restores.taken(*SMALL, *disk)
        vm = restores.restore(path)
        assert vm.state == "running"
        assert "read 512/512" in io_of(vm, "read -P 0x55 0 512")
        assert "wrote 512/512" in io_of(vm, "write -P 0x41 0 512")
        assert raw.read_bytes()[:1] == b"\x55"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("how", ["-snapshot", "snapshot=on"])
def test_a_temporary_disk_with_an_id(restores: Restores, tmp_path: Path, how: str) -> None:
    image(tmp_path / "d", "-f", "qcow2")
    flags, key = (["-snapshot"], "") if how == "-snapshot" else ([], ",snapshot=on")
    path = restores.taken(
        *SMALL, *flags, "-drive", f"file={tmp_path}/d,if=none,id=hd0{key}",
        "-device", "virtio-blk-pci,drive=hd0", disks="none",
    )  # fmt: skip
    vm = restores.restore(path)
    assert vm.state == "running"
    assert f"{tmp_path}/d" in hmp(vm, "info block")


def test_nodes_within_nodes(restores: Restores, tmp_path: Path) -> None:
    """copy-on-read and throttle filters, and an inner node that the device is on."""
    image(tmp_path / "d", "-f", "qcow2")
    image(tmp_path / "e", "-f", "raw")
    path = restores.taken(
        *SMALL, "-object", "throttle-group,id=g",
        "-blockdev", "driver=throttle,throttle-group=g,node-name=t,file.driver=qcow2,"
        f"file.file.driver=file,file.file.filename={tmp_path}/d",
        "-blockdev", f"driver=file,filename={tmp_path}/e,node-name=e0",
        "-blockdev", "driver=copy-on-read,node-name=c,file=e0",
        "-device", "virtio-blk-pci,drive=t", "-device", "virtio-blk-pci,drive=c",
    )  # fmt: skip
    vm = restores.restore(path)
    assert vm.state == "running"
    assert "disk1.qcow2" in hmp(vm, "info block")


# Networks


@pytest.mark.parametrize("backend", ["bridge,br=br0", "tap,fd=33", "tap,fds=33,vhostfds=34"])
def test_a_virtio_card_whose_backend_cannot_be_had(restores: Restores, backend: str) -> None:
    """Its state wants vnet_hdr, which of what can be made here only a tap offers."""
    tap = "tap,script=no,downscript=no"
    path = restores.taken(*SMALL, "-netdev", f"{tap},id=n", "-device", "virtio-net-pci,netdev=n")
    vm = restores.restore(changed(path, tap, backend))
    assert vm.state == "running"
    assert "type=tap" in hmp(vm, "info network")


# Options of the caller's without an id


def test_own_disks_and_ports_take_the_recorded_place(restores: Restores, tmp_path: Path) -> None:
    image(tmp_path / "d", "-f", "qcow2")
    image(tmp_path / "copy", "-f", "qcow2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = restores.taken(
        *SMALL, "-drive", f"file={tmp_path}/d,if=virtio",
        "-nic", "user,model=virtio-net-pci,mac=52:54:00:11:22:33",
    )  # fmt: skip
    own = ["-drive", f"file={tmp_path}/copy,if=virtio"]
    own += ["-nic", f"user,hostfwd=tcp:127.0.0.1:{port}-:22"]
    vm = restores.restore(path, *own)
    assert vm.state == "running"
    assert hmp(vm, "info block").count("qcow2") == 1
    assert f"{tmp_path}/copy" in hmp(vm, "info block")
    assert hmp(vm, "info network").count("type=nic") == 1
    assert "52:54:00:11:22:33" in hmp(vm, "info network")
    assert str(port) in hmp(vm, "info usernet")


# Remedies


def given(error: Exception) -> Sequence[str]:
    """The options that a remedy says to give after --."""
    text = str(error).partition(" -- ")[2]
    return shlex.split(re.split(r"[;)]", text)[0])


def test_no_display(restores: Restores) -> None:
    path = edited(restores.taken(*SMALL), restores.directory / "y.still", here=True,
                  argv=["-display", "gtk"])  # fmt: skip
    with pytest.raises(MachineError, match="restore it with -- -display none") as caught:
        restores.restore(path)
    assert restores.restore(path, *given(caught.value)).state == "running"


def test_too_few_huge_pages(restores: Restores) -> None:
    path = edited(
        restores.taken(*SMALL), restores.directory / "y.still", here=True,
        argv=["-object", "memory-backend-memfd,id=m,size=900G,hugetlb=on,hugetlbsize=2M"],
    )  # fmt: skip
    with pytest.raises(MachineError, match="the huge pages do not suffice") as caught:
        restores.restore(path)
    own = [word.replace("size=900G", "size=1M") for word in given(caught.value)]
    assert restores.restore(path, *own).state == "running"


def test_another_machine_type(restores: Restores) -> None:
    path = edited(restores.taken(*SMALL), restores.directory / "y.still", here=True,
                  machine_type="pc-q35-99.0", executable="/opt/new/qemu-system-x86_64")  # fmt: skip
    wanted = r"pc-q35-99\.0, recorded from /opt/new/qemu-system-x86_64 [\d.]+.*--program"
    with pytest.raises(MachineError, match=wanted):
        restores.restore(path)


def test_a_machine_type_of_a_newer_qemu_and_its_program(restores: Restores) -> None:
    newer = require_newer_qemu()
    path = restores.taken(*SMALL, program=newer)
    with pytest.raises(MachineError, match="--program") as refused:
        restores.restore(path)
    assert "pc-q35-" in str(refused.value)
    assert restores.restore(path, program=newer).state == "running"


def test_a_busy_swtpm(restores: Restores, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, and answers nobody but its first VM."""
    path = restores.taken(*SMALL)
    address = restores.directory / "tpm"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        threading.Thread(target=lambda: listener.accept(), daemon=True).start()
        own = ["-chardev", f"socket,id=c,path={address}", "-tpmdev", "emulator,id=t,chardev=c"]
        with monkeypatch.context() as patch:
            patch.setattr(start_module, "_START_TIMEOUT_S", 4.0)
            with pytest.raises(MachineError, match="a swtpm serves one VM at a time"):
                restores.restore(path, *own, "-device", "tpm-tis,tpmdev=t")
    other = restores.directory / "tpm2"
    state = restores.directory / "tpm-state"
    state.mkdir()
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"]
    swtpm = subprocess.Popen([*words, "--ctrl", f"type=unixio,path={other}"])
    try:
        # It ends with its first client, so nobody may try.
        wait_listening(other, alive=lambda: swtpm.poll() is None)
        own[1] = f"socket,id=c,path={other}"
        vm = restores.restore(path, *own, "-device", "tpm-tis,tpmdev=t")
        assert vm.state == "running"
    finally:
        swtpm.kill()
        swtpm.wait()


def test_a_disk_that_moved(restores: Restores, tmp_path: Path) -> None:
    drives = {
        "-drive": f"file={tmp_path}/d,if=virtio,format=qcow2",
        "-hda": f"{tmp_path}/d",
        "-blockdev": f"driver=qcow2,node-name=f,file.driver=file,file.filename={tmp_path}/d",
    }
    for name, value in drives.items():
        image(tmp_path / "d", "-f", "qcow2")
        device = ["-device", "virtio-blk-pci,drive=f"] if name == "-blockdev" else []
        path = restores.taken(*SMALL, name, value, *device, disks="none")
        (tmp_path / "d").rename(tmp_path / "moved")
        with pytest.raises(NotFoundError, match="give that option yourself after --"):
            restores.restore(path)
        own = value.replace(f"{tmp_path}/d", f"{tmp_path}/moved")
        assert restores.restore(path, name, own).state == "running"


REFUSED = [
    (["-readconfig", "CFG"], ["-readconfig", "CFG"]),
    (["-device", "VGA,id=v", "-set", "device.v.vgamem_mb=32"], ["-set", "device.v.vgamem_mb=32"]),
    (["-drive", "if=virtio,format=raw,file=blkdebug::DISK"],
     ["-drive", "if=virtio,format=raw,file=DISK"]),
    (["-blockdev", "driver=blkdebug,node-name=b,image.driver=file,image.filename=DISK",
      "-device", "virtio-blk-pci,drive=b"],
     ["-blockdev", "driver=file,node-name=b,filename=DISK"]),
    (["-chardev", "null,id=c", "-netdev", "vhost-user,id=n,chardev=c"], ["-netdev", "user,id=n"]),
    (["-usbdevice", "host:1.2"], None),
]  # fmt: skip


@pytest.mark.parametrize(("recorded", "own"), REFUSED, ids=lambda w: " ".join(w or ()))
def test_what_a_refusal_says_to_do_helps(
    restores: Restores, tmp_path: Path, recorded: list[str], own: list[str] | None
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "cfg").write_text('[device "x"]\n driver = "edu"\n')

    def filled(words: list[str]) -> list[str]:
        return [
            w.replace("DISK", f"{tmp_path}/disk").replace("CFG", f"{tmp_path}/cfg") for w in words
        ]

    path = restores.taken(*SMALL)
    path = edited(path, tmp_path / "y.still", here=True, argv=filled(recorded))
    with pytest.raises(RefusedError, match="after --") as caught:
        restores.restore(path)
    if own is None:
        assert "use -device" in str(caught.value)
        return
    assert restores.restore(path, *filled(own)).state == "running"


def test_a_file_of_options_of_ones_own(restores: Restores, tmp_path: Path) -> None:
    """What is in it takes the place of what the recorded file had become, by ids and drivers."""
    (tmp_path / "old").write_text('[device "x"]\n driver = "VGA"\n[device]\n driver = "edu"\n')
    (tmp_path / "new").write_text(
        '[device "x"]\n driver = "VGA"\n xres = "800"\n[device]\n driver = "edu"\n'
    )
    path = restores.taken(*SMALL, "-readconfig", "old", cwd=tmp_path)
    new = f"{tmp_path}/new"
    for own in (["-readconfig", new], ["-readconfig", new, "-set", "device.x.yres=600"]):
        vm = restores.restore(path, *own)
        assert vm.state == "running"
        value = {"path": "/machine/peripheral/x", "property": "xres"}
        assert qmp_execute(Path(vm.qmp_address), "qom-get", value) == 800
        assert hmp(vm, "info pci").count("PCI device 1234:11e8") == 1
    with pytest.raises(UsageError, match=r"gone cannot be read.*give a file that you can read"):
        restores.restore(path, "-readconfig", f"{tmp_path}/gone")


# The clock


def guests_rtc(vm: RestoredVm) -> datetime:
    values = qmp_execute(
        Path(vm.qmp_address),
        "qom-get",
        {"path": "/machine", "property": "rtc-time"},
    )
    return datetime(
        values["tm_year"] + 1900, values["tm_mon"] + 1, values["tm_mday"], values["tm_hour"],
        values["tm_min"], values["tm_sec"], tzinfo=UTC,
    )  # fmt: skip


def test_the_clock_shows_the_hosts_time_or_the_instants(restores: Restores) -> None:
    """The snapshot is made to be an hour old, so that the two differ."""
    path = restores.taken(*SMALL)
    with open_snapshot(path) as opened:
        instant = datetime.fromisoformat(opened.manifest.created)
    hour = timedelta(hours=1)
    path = edited(path, restores.directory / "y.still", here=True,
                  created=(instant - hour).isoformat())  # fmt: skip
    vm = restores.restore(path)
    assert abs(guests_rtc(vm) - datetime.now(UTC)) < timedelta(seconds=30)
    assert any("shows the host's time" in note for note in vm.notes)
    vm = restores.restore(path, clock="instant")
    # It stood still from the take to the restore.
    assert abs(guests_rtc(vm) - (datetime.now(UTC) - hour)) < timedelta(minutes=10)
    assert any("go on from the instant" in note for note in vm.notes)


def test_a_machine_without_a_pcs_clock(restores: Restores) -> None:
    path = restores.taken("-nodefaults", "-M", "microvm,rtc=off", "-m", "16")
    with pytest.raises(RefusedError, match="no RTC of a PC"):
        restores.restore(path, clock="instant")
    assert restores.restore(path).state == "running"
