"""What becomes of each recorded option."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from stillframe.errors import DataError, NotFoundError
from stillframe.restore import ledger, networks, qemu_plan
from stillframe.restore.plan import check_plan
from stillframe.restore.records import RestorePlan
from tests.unit.restore.recorded import Planner, machine


def rewritten(plan: RestorePlan) -> dict[str, str]:
    return {rewrite.before: rewrite.after for rewrite in plan.rewrites}


KEPT = [
    ["-nodefaults", "-no-user-config", "-no-reboot"],
    ["-m", "256M", "-smp", "2,maxcpus=4", "-cpu", "host,migratable=on"],
    ["-accel", "kvm", "-accel", "tcg,thread=multi"],
    ["-append", "root=/dev/vda console=ttyS0; rm -rf /"],
    ["-sandbox", "on,spawn=deny"],
    ["-name", "guest=a,debug-threads=on", "-uuid", "8c1e6d8c-0000-4000-8000-000000000000"],
    ["-serial", "none", "-serial", "null", "-parallel", "none"],
    ["-chardev", "null,id=c", "-serial", "chardev:c"],
    ["-chardev", "pty,id=c", "-device", "isa-serial,chardev=c"],
    ["-vnc", "none"],
    ["-display", "none", "-vga", "std"],
    ["-net", "none"],
    ["-nic", "none"],
    ["-net", "nic,model=e1000", "-net", "user"],
    ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"],
    ["-netdev", "user,id=n0,restrict=on,net=10.0.2.0/24"],
    ["-object", "memory-backend-memfd,id=ram0,size=256M,share=on,hugetlb=on,hugetlbsize=2M"],
    ["-object", "iothread,id=io0", "-object", "rng-random,id=r,filename=/dev/urandom"],
    ["-boot", "order=c,menu=on", "-rtc", "base=utc", "-k", "de"],
    ["-smbios", "type=1,serial=ds=nocloud;s=http://10.0.2.2/x/"],
    ["-fw_cfg", "name=opt/x/y,string=a/b"],
    ["-icount", "shift=3"],
    ["-usbdevice", "tablet"],
    ["-drive", "if=none,id=d0,media=cdrom"],
    ["-global", "ICH9-LPC.disable_s3=1", "-numa", "node,memdev=ram0"],
    ["-device", '{"driver":"virtio-rng-pci","rng":"r","id":"rng0"}'],
]


@pytest.mark.parametrize("argv", KEPT, ids=" ".join)
def test_kept(planner: Planner, argv: list[str]) -> None:
    plan = planner.plan(*argv, here=True)
    assert planner.words(*argv) == argv
    assert not plan.refusals
    assert not plan.needs_trust
    # only the machine type and the monitor were added
    assert [rewrite.before for rewrite in plan.rewrites] == ["", ""]


DROPPED = [
    ["-daemonize"],
    ["-S"],
    ["-preconfig"],
    ["-s"],
    ["-gdb", "tcp::1234"],
    ["-pidfile", "/run/vm.pid"],
    ["-incoming", "exec:cat /x"],
    ["-loadvm", "s1"],
    ["-trace", "enable=*,file=/etc/x"],
    ["-qmp", "unix:/run/vm.qmp,server=on,wait=off"],
    ["-qmp-pretty", "stdio"],
    ["-monitor", "stdio"],
    ["-add-fd", "fd=3,set=1"],
    ["-dump-vmstate", "/x"],
    ["-writeconfig", "/x"],
    ["-qtest", "unix:/x"],
    ["-run-with", "exit-with-parent=on"],
    ["-run-with", "chroot=/jail,user=nobody"],
    ["-chroot", "/jail", "-runas", "nobody"],
    ["-snapshot"],
    ["-object", "input-linux,id=i,evdev=/dev/input/event0"],
    ["-chardev", "socket,id=m,path=/run/x,server=on", "-mon", "chardev=m,mode=control"],
    ["-chardev", "socket,id=m,fd=25,server=on,wait=off", "-mon", "chardev=m,mode=control"],
    ["-chardev", "stdio,id=m", "-qmp", "chardev:m"],
]


@pytest.mark.parametrize("argv", DROPPED, ids=" ".join)
def test_dropped(planner: Planner, argv: list[str]) -> None:
    plan = planner.plan(*argv)
    assert planner.words(*argv) == []
    assert not plan.refusals
    assert {after for before, after in rewritten(plan).items() if before} == {""}


REWRITTEN = [
    (["-M", "q35,usb=off"], ["-M", "pc-q35-7.2,usb=off"]),
    (["-machine", "usb=off,type=q35"], ["-machine", "usb=off,type=pc-q35-7.2"]),
    (["-machine", "accel=kvm"], ["-machine", "accel=kvm"]),
    (["-serial", "mon:vc"], ["-serial", "vc"]),
    (["-serial", "pty:/tmp/link"], ["-serial", "pty"]),
    (["-chardev", "pty,id=c,path=/tmp/link"], ["-chardev", "pty,id=c"]),
    (["-device", "usb-tablet,pcap=/etc/x,id=t"], ["-device", "usb-tablet,id=t"]),
    (["-vnc", ":5"], ["-vnc", ":5,to=104"]),
    (["-vnc", "0.0.0.0:1,password=on"], ["-vnc", "0.0.0.0:1,password=on,to=100"]),
    (["-display", "vnc=:1"], ["-vnc", ":1,to=100"]),
    (["-display", "curses"], ["-display", "none"]),
    (["-curses"], ["-display", "none"]),
    (["-run-with", "async-teardown=on,exit-with-parent=on"], ["-run-with", "async-teardown=on"]),
    (["-run-with", "chroot=/jail,async-teardown=on"], ["-run-with", "async-teardown=on"]),
    (
        ["-netdev", "user,id=n0,hostfwd=tcp::2222-:22,hostfwd=tcp::80-:80,dns=1.1.1.1"],
        ["-netdev", "user,id=n0,dns=1.1.1.1"],
    ),
    (["-nic", "user,model=virtio,hostfwd=tcp::1-:2"], ["-nic", "user,model=virtio"]),
    (["-netdev", "user,id=n0,smb=/home"], ["-netdev", "user,id=n0"]),
    (
        ["-netdev", "tap,id=n0,ifname=tap7,vhost=on,script=/tmp/evil.sh,downscript=/tmp/evil.sh"],
        ["-netdev", "tap,id=n0,vhost=on,script=no,downscript=no"],
    ),
    (
        ["-netdev", "tap,id=n0"],
        ["-netdev", "tap,id=n0,script=no,downscript=no"],
    ),
    (
        ["-netdev", "tap,id=n0,helper=/tmp/evil"],
        ["-netdev", "tap,id=n0,script=no,downscript=no"],
    ),
    (["-netdev", "bridge,id=n0,br=br0,helper=/x"], ["-netdev", "hubport,hubid=1000,id=n0"]),
    (["-netdev", "socket,id=n0,listen=:1234"], ["-netdev", "hubport,hubid=1000,id=n0"]),
    (
        ["-nic", "bridge,br=br0,model=e1000,mac=52:54:00:00:00:01"],
        ["-nic", "hubport,hubid=1000,model=e1000,mac=52:54:00:00:00:01"],
    ),
    (
        ["-nic", "bridge,br=br0,model=virtio,mac=52:54:00:00:00:01"],
        ["-nic", "tap,model=virtio,mac=52:54:00:00:00:01,script=no,downscript=no"],
    ),
    (
        ["-netdev", "bridge,id=n,br=br0", "-device", "virtio-net-pci,netdev=n"],
        ["-netdev", "tap,id=n,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n"],
    ),
    (
        ["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x,share=on,prealloc=on"],
        ["-object", "memory-backend-memfd,id=m,size=1G,share=on,prealloc=on"],
    ),
    (
        ["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/template,share=off"],
        ["-object", "memory-backend-memfd,id=m,size=1G,share=off"],
    ),
    (
        ["-object", "memory-backend-file,id=m,size=1G,mem-path=/etc/x,readonly=on,rom=on"],
        ["-object", "memory-backend-memfd,id=m,size=1G,share=off"],
    ),
    (["-mem-path", "/etc/x"], []),
    (["-global", "usb-tablet.pcap=/etc/x"], []),
    (["-global", "driver=usb-tablet,property=pcap,value=/etc/x"], []),
    (
        ["-netdev", "tap,id=n,fd=3"],
        ["-netdev", "tap,id=n,script=no,downscript=no"],
    ),
    (
        ["-netdev", "tap,id=n,fds=3:4,vhost=on,vhostfds=5:6"],
        ["-netdev", "tap,id=n,vhost=on,queues=2,script=no,downscript=no"],
    ),
    (
        ["-netdev", '{"type":"tap","fd":"3","vhost":true,"vhostfd":"5","id":"n"}'],
        ["-netdev", '{"type":"tap","vhost":true,"id":"n","script":"no","downscript":"no"}'],
    ),
    (
        [
            "-object",
            '{"qom-type":"memory-backend-file","id":"m","size":1024,"mem-path":"/x","share":true}',
        ],
        ["-object", '{"qom-type":"memory-backend-memfd","id":"m","size":1024,"share":true}'],
    ),
]


@pytest.mark.parametrize(("argv", "wanted"), REWRITTEN, ids=lambda argv: " ".join(argv))
def test_rewritten(planner: Planner, argv: list[str], wanted: list[str]) -> None:
    plan = planner.plan(*argv, here=True)
    assert planner.words(*argv) == wanted
    assert not plan.refusals
    assert not plan.needs_trust


PRIVATE = [
    (["-serial", "unix:/run/s,server"], "-serial unix:RUN/serial.sock,server=on,wait=off,logfile"),
    (["-serial", "mon:stdio"], "-serial unix:RUN/serial.sock,"),
    (["-serial", "tcp::4444,server"], "-serial unix:RUN/serial.sock,"),
    (["-serial", "/dev/ttyS0"], "-serial unix:RUN/serial.sock,"),
    (["-serial", "file:/etc/passwd"], "-serial file:RUN/serial.log"),
    (["-parallel", "file:/etc/passwd"], "-parallel file:RUN/parallel.log"),
    (["-nographic"], "-nographic -serial unix:RUN/serial.sock,"),
    (["-chardev", "file,id=c,path=/etc/passwd"], "-chardev file,id=c,path=RUN/c.log"),
    (
        ["-chardev", "socket,id=c,path=/run/vm.s,server=on"],
        "-chardev socket,id=c,path=RUN/c.sock,server=on,wait=off",
    ),
    (["-chardev", "socket,id=c,fd=12,server=on"], "-chardev socket,id=c,path=RUN/c.sock"),
    (["-chardev", "socket,id=c,host=h,port=1"], "-chardev socket,id=c,path=RUN/c.sock"),
    (["-chardev", "serial,id=c,path=/dev/ttyS0"], "-chardev socket,id=c,path=RUN/c.sock"),
    (["-chardev", "pty,id=c,logfile=/etc/x"], "-chardev pty,id=c,logfile=RUN/c-log.log"),
    (
        ["-chardev", "stdio,id=c,mux=on"],
        "-chardev socket,id=c,mux=on,path=RUN/c.sock,server=on,wait=off,logfile=RUN/c.log",
    ),
    (["-chardev", "socket,id=../../e/x,path=/x"], "-chardev socket,id=../../e/x,path=RUN/_.._e_x"),
    (["-vnc", "unix:/run/vnc"], "-vnc unix:RUN/vnc.sock"),
    (["-spice", "port=5900,disable-ticketing=on"], "-spice disable-ticketing=on,unix=on,addr=RUN/"),
    (["-D", "/var/log/qemu.log"], "-D RUN/debug.log"),
    (["-audiodev", "wav,id=a,path=/etc/x"], "-audiodev wav,id=a,path=RUN/a.log"),
    (
        ["-object", "filter-dump,id=f,netdev=n,file=/x"],
        "-object filter-dump,id=f,netdev=n,file=RUN",
    ),
]


@pytest.mark.parametrize(("argv", "wanted"), PRIVATE, ids=lambda x: x if isinstance(x, str) else "")
def test_private(planner: Planner, argv: list[str], wanted: str) -> None:
    plan = planner.plan(*argv)
    words = " ".join(planner.words(*argv)).replace(str(planner.run), "RUN")
    assert words.startswith(wanted)
    assert not plan.refusals
    mine = [t for t in plan.touches if t.access in ("create", "listen", "write")]
    assert all(touch.target.startswith(str(planner.run)) for touch in mine)


def test_private_names_do_not_meet(planner: Planner) -> None:
    words = planner.words("-serial", "stdio", "-serial", "unix:/a", "-chardev", "udp,id=serial")
    paths = re.findall(r"/run/([\w.-]+)", " ".join(words))
    assert len(paths) == len(set(paths)) == 5


def test_a_chardev_that_a_monitor_shares_stays(planner: Planner) -> None:
    argv = ["-chardev", "stdio,id=c,mux=on", "-mon", "chardev=c", "-serial", "chardev:c"]
    words = planner.words(*argv)
    assert words[0] == "-chardev"
    assert words[2:] == ["-serial", "chardev:c"]


REFUSED = [
    (["-netdev", "vhost-user,id=n,chardev=c"], "another process"),
    (["-device", "vhost-user-fs-pci,chardev=c"], "another process"),
    (["-device", "vfio-pci,host=01:00.0"], "cannot be restored"),
    (["-device", '{"driver":"vfio-pci","host":"01:00.0"}'], "cannot be restored"),
    (["-device", "usb-host,vendorid=1"], "cannot be restored"),
    (["-device", "vhost-scsi-pci,wwpn=x,vhostfd=3"], "kernel"),
    (["-device", "virtio-net-pci,x=1,fd=3"], "file descriptor"),
    (["-tpmdev", "emulator,id=t,chardev=c"], "TPM"),
    (["-readconfig", "/etc/x"], "from a file"),
    (["-set", "drive.d0.file=/etc/shadow"], "past the plan"),
    (["-drive", "file=/dev/fdset/1,id=d"], "file descriptor"),
    (["-drive", "file=fat:rw:/home,id=d"], "protocol fat:"),
    (["-drive", "filename=/home/me/x,format=raw,if=virtio"], "by filename"),
    (["-drive", "driver=vvfat,dir=/home,rw=on"], "block driver vvfat"),
    (["-blockdev", "driver=luks,node-name=n,file=f"], "no node f"),
    (["-icount", "shift=1,rr=record,rrfile=/x"], "records or replays"),
    (["-usbdevice", "host:1.2"], "device of the host"),
    (["-virtfs", "proxy,socket=/x,mount_tag=m"], "helper process"),
    (["-object", "sev-guest,id=s"], "encrypted"),
]


@pytest.mark.parametrize(("argv", "reason"), REFUSED, ids=lambda x: " ".join(x))
def test_refused(planner: Planner, argv: list[str], reason: str) -> None:
    plan = planner.plan(*argv)
    assert len(plan.refusals) == 1
    assert reason in plan.refusals[0].reason
    assert argv[0] not in plan.argv[1:]


RISKY = [
    ["-plugin", "/tmp/evil.so"],
    ["-unknown-option", "value"],
    ["-object", "qtest,id=q,chardev=c,log=/etc/x"],
    ["-global", "virtio-blk-pci.drive=d0"],
    ["-semihosting"],
    ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:/tmp/evil"],
    ["-netdev", '{"type":"user","id":"n","guestfwd":[{"str":"tcp:1.2.3.4:5-cmd:/tmp/evil"}]}'],
    ["-device", "made-up,uri=exec:/tmp/evil"],
    ["-virtfs", "local,path=/home,mount_tag=m,security_model=none"],
    ["-fsdev", "local,path=/home,id=f,security_model=none"],
    ["-device", "usb-mtp,rootdir=/home"],
    ["-nic", "model=e1000"],  # of the kind "user", as nothing else is said
    ["-nic", ""],
    ["-spice", "unheard-of"],
    ["-smbios", "unheard-of,type=1"],
    ["-device", "virtio-gpu-pci,blob=on"],
    ["-global", "virtio-gpu-device.blob=on"],
    ["-global", "e1000.romfile=/etc/x,property=mac,value=1,driver=e1000"],
]


@pytest.mark.parametrize("argv", RISKY, ids=" ".join)
def test_risky(planner: Planner, argv: list[str]) -> None:
    plan = planner.plan(*argv)
    assert plan.risks
    assert plan.needs_trust
    assert all(argv[0] in risk.option for risk in plan.risks)
    assert not plan.refusals
    assert not planner.plan(*argv, here=True).needs_trust


def test_a_directory_that_is_shared_read_only(planner: Planner) -> None:
    argv = ["-virtfs", "local,path=/home,mount_tag=m,security_model=none,readonly=on"]
    plan = planner.plan(*argv)
    assert ("read", "/home") in [(t.access, t.target) for t in plan.touches]


FILES = [
    ["-kernel", "FILE"],
    ["-initrd", "FILE"],
    ["-initrd", "FILE one,FILE two"],
    ["-dtb", "FILE"],
    ["-bios", "FILE"],
    ["-fw_cfg", "name=opt/x,file=FILE"],
    ["-smbios", "file=FILE"],
    ["-acpitable", "sig=SLIC,file=/nowhere:FILE"],
    ["-acpitable", "FILE"],
    ["-option-rom", "FILE"],
    ["-option-rom", "bootindex=1,romfile=FILE"],
    ["-boot", "splash=FILE"],
    ["-cdrom", "FILE"],
    ["-drive", "file=FILE,media=cdrom"],
    ["-drive", "file=FILE,if=pflash,readonly=on"],
    ["-device", "virtio-net-pci,romfile=FILE"],
    ["-device", "loader,file=FILE"],
    ["-object", "secret,id=s,file=FILE"],
    ["-object", "tls-creds-x509,id=t,dir=FILE"],
    ["-netdev", "user,id=n,tftp=FILE"],
    ["-L", "FILE"],
    ["-machine", "q35,firmware=FILE"],
    ["-global", "virtio-net-pci.romfile=FILE"],
]


@pytest.mark.parametrize("argv", FILES, ids=" ".join)
@pytest.mark.parametrize("relative", [False, True])
def test_files_are_listed(planner: Planner, argv: list[str], relative: bool) -> None:
    file = planner.directory / "the,file"
    file.touch()
    given = str(file) if not relative else file.name
    words = [
        word.replace("FILE", given if word == "FILE" else given.replace(",", ",,")) for word in argv
    ]
    if argv[0] == "-global":  # a comma is a comma there
        words = [word.replace("FILE", given) for word in argv]
    if argv[0] in ("-initrd", "-acpitable", "-option-rom"):  # a comma is doubled there
        words = [word.replace("FILE", given.replace(",", ",,")) for word in argv]
    plan = planner.plan(*words)
    assert ("read", str(file)) in [(t.access, t.target) for t in plan.touches]


def test_a_rom_of_qemus_own_is_no_file_of_the_vm(planner: Planner) -> None:
    """As the live machine tells the default of ``romfile``."""
    for argv in (["-device", "e1000,romfile=efi-e1000.rom"], ["-option-rom", "efi-e1000.rom"]):
        assert not planner.plan(*argv).needs_trust
        assert not [t for t in planner.plan(*argv).touches if "efi" in t.target]


def test_a_file_that_qemu_would_take_for_its_own(
    planner: Planner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    firmware = tmp_path / "firmware"
    firmware.mkdir()
    monkeypatch.setattr(qemu_plan, "FIRMWARE_DIRECTORIES", (str(firmware), "/gone"))
    (firmware / "bios-256k.bin").touch()
    assert not planner.plan("-m", "64").needs_trust
    for name in ("bios-256k.bin", "en-us"):
        (tmp_path / name).touch()
        plan = planner.plan("-m", "64")
        assert ("read", str(tmp_path / name)) in [(t.access, t.target) for t in plan.touches]
        assert any("in place of QEMU's own" in risk.reason for risk in plan.risks)
        (tmp_path / name).unlink()


def test_a_way_out_of_a_firmware_directory(
    planner: Planner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    firmware = tmp_path / "firmware"
    firmware.mkdir()
    (firmware / "rom").touch()
    (firmware / "link").symlink_to("/etc")
    monkeypatch.setattr(ledger, "FIRMWARE_DIRECTORIES", (f"{firmware}/",))
    assert not planner.plan("-kernel", f"{firmware}/rom").needs_trust
    for path in ("../x", "link/passwd", "link/../etc/passwd", "../firmware/link/passwd"):
        plan = planner.plan("-kernel", f"{firmware}/{path}")
        assert plan.needs_trust, path


LONG = "x" * 5000


@pytest.mark.parametrize("name", ["L", "bios", "k", "initrd", "kernel", "option-rom", "mem-path"])
def test_a_name_that_is_longer_than_linux_allows(planner: Planner, name: str) -> None:
    plan = planner.plan(f"-{name}", LONG, cwd=f"/{LONG}", here=True)
    assert plan.cwd == "/"
    with contextlib.suppress(NotFoundError):
        check_plan(plan, trust=False)


def test_a_context_id_is_moved(planner: Planner) -> None:
    words = planner.words("-device", "vhost-vsock-pci,id=v,guest-cid=3")
    cid = re.fullmatch(r"vhost-vsock-pci,id=v,guest-cid=(\d+)", words[1])
    assert cid is not None
    assert int(cid[1]) > 3


def test_a_machine_type_is_nothing_else(planner: Planner) -> None:
    """It is data from the file, too: no other property, and no option of its own."""
    evil = "dumpdtb=/tmp/x,firmware=/etc/shadow"
    written = "type=dumpdtb=/tmp/x,,firmware=/etc/shadow"
    assert planner.plan("-m", "64", machine_type=evil).argv[7:9] == ("-machine", written)
    assert planner.plan("-M", "q35", machine_type=evil).argv[1:3] == ("-M", written)


def test_an_absent_machine_option_is_added(planner: Planner) -> None:
    assert planner.plan("-m", "64").argv[7:9] == ("-machine", "type=pc-q35-7.2")


def test_paused(planner: Planner) -> None:
    assert planner.plan("-m", "64", options={"paused": True}).argv[-1] == "-S"


def test_a_lost_directory(planner: Planner, tmp_path: Path) -> None:
    plan = planner.plan("-kernel", "vmlinuz", cwd=str(tmp_path / "gone"))
    assert plan.cwd == "/"
    assert "/vmlinuz" in [touch.target for touch in plan.touches]  # where QEMU would look
    assert any("gone is not here" in note for note in plan.notes)


def test_what_takes_rights_that_are_not_there(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_plan, "_may_administer_networks", lambda: False)
    plan = planner.plan("-netdev", "tap,id=n,fd=3", here=True)
    assert "CAP_NET_ADMIN" in plan.refusals[0].reason
    assert "restore as root" in plan.refusals[0].remedy


def test_without_vhost_net(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_VHOST", Path("/nowhere"))
    words = planner.words("-netdev", "tap,id=n,vhost=on")
    assert words[1] == "tap,id=n,vhost=off,script=no,downscript=no"


# Where it runs


@pytest.mark.parametrize(
    "words",
    [
        ["-device", "e1000,romfile=etc/hostname"],
        ["-bios", "etc/hostname"],
        ["-machine", "q35,x-file=etc/hostname"],
    ],
)
@pytest.mark.parametrize("gone", ["", "/gone"])
def test_names_are_relative_to_where_it_runs(planner: Planner, words: list[str], gone: str) -> None:
    """A directory that is not there lends no name its harmlessness: QEMU runs in / then."""
    plan = planner.plan(*words, cwd=f"/usr/share/qemu{gone}")
    assert plan.needs_trust
    if plan.cwd == "/":
        assert ("read", "/etc/hostname") in [(t.access, t.target) for t in plan.touches]


def test_a_file_from_elsewhere_does_not_choose_the_directory(planner: Planner) -> None:
    """QEMU may leave a core there, or find what appears later."""
    directory = planner.directory
    plan = planner.plan("-m", "64")
    assert (plan.cwd, plan.needs_trust) == ("/", ())
    assert planner.plan("-m", "64", here=True).cwd == str(directory)
    (directory / "rom").touch()
    assert planner.plan("-option-rom", "rom").cwd == str(directory)
    assert planner.plan("-option-rom", "gone").needs_trust


def test_a_link_to_firmware_is_a_file_of_the_vm(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may point elsewhere in a moment."""
    firmware = planner.directory / "firmware"
    firmware.mkdir()
    (firmware / "rom").touch()
    (planner.directory / "link").symlink_to(firmware / "rom")
    monkeypatch.setattr(ledger, "FIRMWARE_DIRECTORIES", (f"{firmware}/",))
    assert not planner.plan("-bios", f"{firmware}/rom").needs_trust
    assert planner.plan("-bios", f"{planner.directory}/link").needs_trust


# Odd values


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-vnc", "unix:passwd,vnc=none"], "it has several addresses"),
        (["-vnc", "unix:passwd,vnc=:5"], "it has several addresses"),
        (["-machine", "q35,accel=xen"], "does not know the accelerator xen"),
        (["-mem-prealloc"], "takes all of its memory at once"),
        (["-overcommit", "mem-lock=on"], "takes all of its memory at once"),
        (["-object", "memory-backend-ram,id=r,size=1T,prealloc=on"], "all of its memory at once"),
        (["-object", "memory-backend-file,id=r,size=1T,mem-path=/dev/shm/x,prealloc=on"],
         "all of its memory at once"),
        (["-netdev", "tap,id=n,queues=\u00b2"], "what queues=\u00b2 does"),
    ],
)  # fmt: skip
def test_what_somebody_has_to_answer_for(planner: Planner, words: list[str], reason: str) -> None:
    assert any(reason in risk.reason for risk in planner.plan(*words).risks)


def test_no_second_address_for_vnc(planner: Planner) -> None:
    assert planner.words("-vnc", "none,websocket=unix:passwd") == ["-vnc", "none"]


@pytest.mark.parametrize("key", ["index", "unit", "bus"])
def test_numbers_that_are_none(planner: Planner, key: str) -> None:
    for number in ("9" * 5000, "\u0663", "-1", "\u00b2"):
        assert planner.plan("-drive", f"file=/x,if=scsi,{key}={number}").overlays
    assert not planner.plan("-netdev", f"tap,id=n,queues={'9' * 5000}").needs_trust


@pytest.mark.parametrize("text", ["/x\\u0000y", "/x\\ud800y"])
def test_json_with_what_is_no_text_of_qemus(planner: Planner, text: str) -> None:
    for words in (
        ["-device", f'{{"driver":"loader","file":"{text}"}}'],
        ["-blockdev", f'{{"driver":"file","node-name":"n","filename":"{text}"}}'],
        ["-object", f'{{"qom-type":"secret","id":"{text}"}}'],
    ):
        with pytest.raises(DataError, match="JSON is malformed"):
            planner.plan(*words)
    json_file = f'json:{{"driver":"file",,"filename":"{text}"}}'
    plan = planner.plan("-drive", f"if=virtio,file={json_file}")
    assert any("JSON is malformed" in refusal.reason for refusal in plan.refusals)


def test_qemus_default_display_is_listed(planner: Planner) -> None:
    """It opens a window, or a port for VNC."""
    for words, listed in (
        ([], True), (["-vga", "std"], True), (["-nodefaults"], True),
        (["-display", "none"], False), (["-nographic"], False), (["-vnc", "none"], False),
        (["-spice", "port=5900"], False), (["-curses"], False),
    ):  # fmt: skip
        plan = planner.plan_record(machine([*words, "-net", "none"]))
        found = any("VNC on 127.0.0.1" in touch.target for touch in plan.touches)
        assert (found, bool(plan.needs_trust)) == (listed, listed), words
    assert not planner.plan_record(machine(["-net", "none"]), here=True).needs_trust
    for kind in ("gtk", "sdl", "default"):
        plan = planner.plan("-display", kind)
        assert any("a window on the host" in risk.reason for risk in plan.risks)
