"""QEMU command lines, as people and libvirt write them."""

from __future__ import annotations

import pytest

from stillframe.machine.qemu.command_line import Chardev, key_values, options, parse_command_line

MIB = 1 << 20


def parse(text: str) -> object:
    return parse_command_line(["qemu-system-x86_64", *text.split()])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("-name foo", "foo"),
        ("--name foo", "foo"),
        ("-name foo,process=bar", "foo"),
        ("-name guest=foo,debug-threads=on", "foo"),
        ("-name debug-threads=on,guest=foo", "foo"),
        ("-name a,,b", "a,b"),
        ("-name guest=a=b", "a=b"),
        ("-S", ""),
        ("-append -name", ""),
        ("-S -name foo", "foo"),
        ("disk.img -name foo", "foo"),
        ("-name", ""),
    ],
)
def test_name(text: str, name: str) -> None:
    assert parse(text).name == name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("-S", 128),
        ("-m 512", 512),
        ("-m 2G", 2048),
        ("-m 2g", 2048),
        ("-m 0.5G", 512),
        ("-m size=524288k", 512),
        ("-m 4G,slots=2,maxmem=8G", 4096),
        ("-m slots=2,size=64M,maxmem=8G", 64),
        ("-m 1T", 1 << 20),
        ("-m nonsense", 128),
        ("-m", 128),
    ],
)
def test_ram(text: str, mib: int) -> None:
    assert parse(text).ram_bytes == mib * MIB  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "accelerators"),
    [
        ("-S", ("tcg",)),
        ("-enable-kvm", ("kvm",)),
        ("-accel kvm", ("kvm",)),
        ("-accel tcg,thread=multi", ("tcg",)),
        ("-accel kvm -accel tcg", ("kvm", "tcg")),
        ("-machine q35,accel=kvm:tcg", ("kvm", "tcg")),
        ("-M accel=tcg", ("tcg",)),
        ("-machine type=pc,accel=xen", ("xen",)),
    ],
)
def test_accelerators(text: str, accelerators: tuple[str, ...]) -> None:
    assert parse(text).accelerators == accelerators  # type: ignore[attr-defined]


def test_the_program_name_kvm_means_kvm() -> None:
    assert parse_command_line(["/usr/bin/qemu-kvm", "-S"]).accelerators == ("kvm",)
    assert parse_command_line([]).accelerators == ("tcg",)


UNIX = Chardev(path="/run/q")


@pytest.mark.parametrize(
    ("text", "monitors"),
    [
        ("-S", ()),
        ("-qmp unix:/run/q,server=on,wait=off", (UNIX,)),
        ("-qmp unix:/run/q,server,nowait", (UNIX,)),
        ("-qmp-pretty unix:/run/q,server,nowait", (UNIX,)),
        ("-qmp unix:rel,server=on", (Chardev(path="rel"),)),
        ("-qmp unix:/run/a,,b,server=on", (Chardev(path="/run/a,b"),)),
        ("-qmp unix:/run/q", ()),  # QEMU connects to somebody: nobody can connect to it
        ("-qmp stdio", ()),
        ("-qmp tcp:localhost:4444,server=on,wait=off", (Chardev(host_port=("localhost", 4444)),)),
        ("-qmp tcp::4444,server=on", (Chardev(host_port=("127.0.0.1", 4444)),)),
        ("-qmp tcp:0.0.0.0:4444,server=on", (Chardev(host_port=("127.0.0.1", 4444)),)),
        ("-qmp tcp:[::1]:4444,server=on", (Chardev(host_port=("::1", 4444)),)),
        ("-qmp tcp:h:name,server=on", ()),
        ("-chardev socket,id=c,path=/run/q,server=on -mon chardev=c,mode=control", (UNIX,)),
        ("-mon c,mode=control -chardev socket,id=c,path=/run/q,server=on", (UNIX,)),
        ("-chardev socket,id=c,path=/run/q,server=on -qmp chardev:c", (UNIX,)),
        ("-chardev socket,id=c,path=/run/q,server=on -mon chardev=c", ()),  # for humans
        ("-chardev socket,id=c,path=/run/q,server=on -mon chardev=d,mode=control", ()),
        ("-chardev socket,id=c,path=/run/q,server=off -mon chardev=c,mode=control", ()),
        ("-chardev socket,id=c,fd=25,server=on -mon chardev=c,mode=control", (Chardev(fd=25),)),
        ("-chardev socket,id=c,path=x,abstract=on,server=on -mon c,mode=control", ()),
        ("-chardev pty,id=c -mon c,mode=control", ()),
        (
            "-chardev socket,id=c,host=h,port=99,server=on -mon c,mode=control",
            (Chardev(host_port=("h", 99)),),
        ),
        ("-monitor unix:/run/hmp,server=on", ()),
    ],
)
def test_monitors(text: str, monitors: tuple[Chardev, ...]) -> None:
    assert parse(text).monitors == monitors  # type: ignore[attr-defined]


def test_a_value_that_looks_like_an_option_is_a_value() -> None:
    words = ["q", "-append", "-qmp", "-nographic", "img", "-m", "64"]
    assert list(options(words)) == [("append", "-qmp"), ("nographic", ""), ("m", "64")]


def test_key_values() -> None:
    assert key_values("a,b=c,d", "k") == {"k": "a", "b": "c", "d": "on"}
    assert key_values("", "k") == {}
    assert key_values("x,,y=1", "k") == {"x,y": "1"}
    assert key_values("a,,,b=1", "k") == {"k": "a,", "b": "1"}


HUMAN = Chardev(path="/run/m")


@pytest.mark.parametrize(
    ("text", "monitors"),
    [
        ("-monitor unix:/run/m,server=on,wait=off", (HUMAN,)),
        ("-monitor unix:/run/m,server,nowait", (HUMAN,)),
        ("-chardev socket,id=c,path=/run/m,server=on -mon chardev=c", (HUMAN,)),
        ("-mon c,mode=readline -chardev socket,id=c,path=/run/m,server=on", (HUMAN,)),
        ("-chardev socket,id=c,path=/run/m,server=on -monitor chardev:c", (HUMAN,)),
        ("-chardev socket,id=c,path=/run/m,server=on -mon chardev=c,mode=control", ()),
        ("-qmp unix:/run/m,server=on", ()),
        ("-monitor stdio", ()),
        ("-monitor none", ()),
        ("-monitor telnet:127.0.0.1:4000,server,nowait", ()),
    ],
)
def test_human_monitors(text: str, monitors: tuple[Chardev, ...]) -> None:
    assert parse(text).human_monitors == monitors  # type: ignore[attr-defined]
