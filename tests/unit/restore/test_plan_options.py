"""What becomes of each recorded option."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillframe.restore.records import RestorePlan
from tests.unit.restore.recorded import Planner


def rewritten(plan: RestorePlan) -> dict[str, str]:
    return {rewrite.before: rewrite.after for rewrite in plan.rewrites}


KEPT = [
    ["-nodefaults", "-no-user-config", "-no-reboot"],
    ["-m", "256M", "-smp", "2,maxcpus=4", "-cpu", "host,migratable=on"],
    ["-accel", "kvm", "-accel", "tcg,thread=multi"],
    ["-append", "root=/dev/vda console=ttyS0; rm -rf /"],
    ["-sandbox", "on,spawn=deny", "-runas", "nobody"],
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
    plan = planner.plan(*argv)
    assert planner.words(*argv) == argv
    assert not plan.refusals
    assert not plan.risks
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
        ["-nic", "bridge,br=br0,model=virtio,mac=52:54:00:00:00:01"],
        ["-nic", "hubport,hubid=1000,model=virtio,mac=52:54:00:00:00:01"],
    ),
    (
        ["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x,share=on,prealloc=on"],
        ["-object", "memory-backend-memfd,id=m,size=1G,share=on,prealloc=on"],
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
    plan = planner.plan(*argv)
    assert planner.words(*argv) == wanted
    assert not plan.refusals
    assert not plan.risks


def test_a_private_file_of_memory_is_kept(planner: Planner) -> None:
    argv = ["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/template,share=off"]
    assert planner.words(*argv) == argv


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
    (["-netdev", "tap,id=n,fd=3"], "file descriptor"),
    (["-netdev", "tap,id=n,fds=3:4,vhost=on,vhostfds=5:6"], "file descriptor"),
    (["-netdev", '{"type":"tap","id":"n","fds":"3"}'], "file descriptor"),
    (["-netdev", "vhost-user,id=n,chardev=c"], "another process"),
    (["-device", "vhost-user-fs-pci,chardev=c"], "another process"),
    (["-device", "vfio-pci,host=01:00.0"], "cannot be restored"),
    (["-device", '{"driver":"vfio-pci","host":"01:00.0"}'], "cannot be restored"),
    (["-device", "usb-host,vendorid=1"], "cannot be restored"),
    (["-device", "vhost-scsi-pci,wwpn=x,vhostfd=3"], "kernel"),
    (["-device", "virtio-net-pci,x=1,fd=3"], "file descriptor"),
    (["-tpmdev", "emulator,id=t,chardev=c"], "TPM"),
    (["-readconfig", "/etc/x"], "from a file"),
    (["-global", "usb-tablet.pcap=/etc/x"], "writes to a file"),
    (["-global", "driver=usb-tablet,property=pcap,value=/etc/x"], "writes to a file"),
    (["-set", "drive.d0.file=/etc/shadow"], "past the plan"),
    (["-drive", "file=/dev/fdset/1,id=d"], "file descriptor"),
    (["-drive", "file=fat:rw:/home,id=d"], "directory"),
    (["-drive", "driver=qcow2,file.driver=nbd,file.host=h,id=d"], "file.driver, file.host"),
    (["-drive", "filename=/home/me/x,format=raw,if=virtio"], "by filename"),
    (["-drive", "driver=vvfat,dir=/home,rw=on"], "by dir, rw"),
    (["-drive", "driver=null-co"], "no image file"),
    (["-blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=/x"], "overlay"),
    (["-blockdev", "driver=luks,node-name=n,file=f"], "overlay"),
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
]


@pytest.mark.parametrize("argv", RISKY, ids=" ".join)
def test_risky(planner: Planner, argv: list[str]) -> None:
    plan = planner.plan(*argv)
    assert len(plan.risks) == 1
    assert argv[0] in plan.risks[0].option
    assert not plan.refusals


def test_a_directory_that_is_shared_read_only(planner: Planner) -> None:
    argv = ["-virtfs", "local,path=/home,mount_tag=m,security_model=none,readonly=on"]
    plan = planner.plan(*argv)
    assert not plan.risks
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
    if argv[0] == "-initrd":  # always a list to QEMU
        words = [word.replace("FILE", given.replace(",", ",,")) for word in argv]
    plan = planner.plan(*words)
    assert ("read", str(file)) in [(t.access, t.target) for t in plan.touches]


def test_a_context_id_is_moved(planner: Planner) -> None:
    words = planner.words("-device", "vhost-vsock-pci,id=v,guest-cid=3")
    cid = re.fullmatch(r"vhost-vsock-pci,id=v,guest-cid=(\d+)", words[1])
    assert cid is not None
    assert int(cid[1]) > 3


def test_a_machine_type_is_nothing_else(planner: Planner) -> None:
    """It is data from the file, too: no other property, and no option of its own."""
    evil = "dumpdtb=/tmp/x,firmware=/etc/shadow"
    written = "type=dumpdtb=/tmp/x,,firmware=/etc/shadow"
    assert planner.plan("-m", "64", machine_type=evil).argv[3:5] == ("-machine", written)
    assert planner.plan("-M", "q35", machine_type=evil).argv[1:3] == ("-M", written)


def test_an_absent_machine_option_is_added(planner: Planner) -> None:
    assert planner.plan("-m", "64").argv[3:5] == ("-machine", "type=pc-q35-7.2")


def test_paused(planner: Planner) -> None:
    assert planner.plan("-m", "64", options={"paused": True}).argv[-1] == "-S"


def test_a_lost_directory(planner: Planner, tmp_path: Path) -> None:
    plan = planner.plan("-kernel", "vmlinuz", cwd=str(tmp_path / "gone"))
    assert plan.cwd == "/"
    assert str(tmp_path / "gone" / "vmlinuz") in [touch.target for touch in plan.touches]
