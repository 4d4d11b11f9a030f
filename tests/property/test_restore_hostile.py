"""Command lines of somebody else, nested and odd: nothing of this host is touched unlisted.

Every value that could name something of the host holds ``MARK``. Where it is left in the new
command line, the plan asks for trust; and what is written or run is never hidden as a read.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.errors import StillframeError
from stillframe.restore.argv_reader import unaccounted
from stillframe.restore.records import RestorePlan
from tests.unit.restore.recorded import Planner

_KEY_WORDS = """
driver filename file backing data-file node-name read-only auto-read-only config image log raw
test path rw dir url socket server.type server.path encrypt.key-secret file.driver file.filename
file.read-only backing.file.filename offset detach-zeroes x-image children.0 bottom copy-on-read
force-share locking size mode throttle-group snapshot format id if read-pattern vote-threshold
top-id target
"""
_DRIVER_WORDS = """
raw file qcow2 luks qed vmdk vdi throttle copy-on-read blkdebug blkverify blklogwrites blkreplay
quorum vvfat host_device host_cdrom nbd null-co preallocate compress copy-before-write snapshot-
access nvme rbd ssh https iscsi nfs gluster parallels replication
"""
_OPTION_WORDS = """
blockdev drive device object chardev netdev nic audiodev display vnc spice serial fw_cfg smbios
acpitable machine accel global virtfs fsdev bios kernel initrd L k mem-path D option-rom boot
run-with numa tpmdev readconfig plugin trace semihosting-config unheard-of icount incoming
"""
_VALUE_WORDS = """
file filename path romfile host dir mem-path script downscript helper smb tftp bootfile guestfwd
hostfwd out.dev in.dev server rendernode addr rootdir pcap logfile db evdev fd name serial
kernel initrd sdrfile config splash firmware dtb device string chroot security_model socket
x509-dir data value log readonly share websocket tls-creds ifname br
"""
GUESTS_TEXT = re.compile(r"\b(serial|string|name|value)=([^,]|,,)*")
"""What the guest is shown, of SMBIOS and the like."""
MARK = "HOSTILE"
PATH = f"/srv/{MARK}/x"
TEXTS = st.sampled_from(
    [
        PATH,
        f"{MARK}.img",
        f"file:{PATH}",
        f"json:{json.dumps({'driver': 'file', 'filename': PATH})}",
        f"json:{json.dumps({'driver': 'raw', 'file': {'driver': 'file', 'filename': PATH}})}",
        f"blkdebug::{PATH}",
        f"blkverify:{PATH}:{PATH}",
        f"nbd:unix:{PATH}",
        f"nbd+unix:///?socket={PATH}",
        f"fat:{PATH}",
        f"fat:rw:{PATH}",
        f"fat:floppy:rw:{PATH}",
        f"rbd:pool/image:log_file={PATH}",
        f"exec:{PATH}",
        f"|{PATH}",
        f"unix:{PATH}",
        f"host_device:{PATH}",
        f"/dev/{MARK}",
    ]
)
KEYS = st.sampled_from(_KEY_WORDS.split())
DRIVERS = st.sampled_from(
    _DRIVER_WORDS.split()
)  # fmt: skip
SWITCHES = st.sampled_from([True, False, "on", "off", None, 0, 1 << 20])


@st.composite
def nodes(draw: st.DrawFn, depth: int = 3) -> dict[str, Any]:
    tree: dict[str, Any] = {"driver": draw(DRIVERS)}
    for key in draw(st.lists(KEYS, max_size=4, unique=True)):
        if key in ("file", "backing", "data-file", "config", "image", "raw", "test", "log"):
            if depth and draw(st.booleans()):
                tree[key] = draw(nodes(depth - 1))
            else:
                tree[key] = draw(st.one_of(TEXTS, st.sampled_from(["a", "b", "q0"])))
        elif key == "node-name":
            tree[key] = draw(st.sampled_from(["a", "b", "q0"]))
        elif key == "driver":
            continue
        else:
            tree[key] = draw(st.one_of(TEXTS, SWITCHES))
    if tree["driver"] in ("file", "host_device") and draw(st.booleans()):
        tree = {
            "driver": "file",
            "filename": PATH,
            **{k: tree[k] for k in tree if k == "node-name"},
        }
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = (
                {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
            )
            yield f"{prefix}{key}={str(text).replace(',', ',,')}"


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(_OPTION_WORDS.split()))
    text = draw(TEXTS)
    commas = text.replace(",", ",,")
    if name == "blockdev":
        tree = {"node-name": "a", **draw(nodes())}
        return ["-blockdev", json.dumps(tree) if draw(st.booleans()) else ",".join(flat(tree))]
    if name == "drive":
        parts = list(flat(draw(nodes()))) if draw(st.booleans()) else [f"file={commas}"]
        more = draw(st.lists(st.sampled_from(
            ["if=none", "id=q0", "media=cdrom", "readonly=on", "readonly=off", "format=raw",
             "format=qcow2", "snapshot=on", "copy-on-read=on", "noreadonly",
             f"backing.file.filename={commas}"]
        ), max_size=4))  # fmt: skip
        return ["-drive", ",".join([*parts, *more])]
    kinds = {
        "device": "virtio-net-pci e1000 usb-mtp loader guest-loader vhost-vsock-pci nvdimm"
        " hda-duplex ccid-card-emulated u2f-emulated virtio-gpu-rutabaga usb-storage"
        " ipmi-bmc-sim pvrdma made-up",
        "object": "rng-random rng-egd secret secret_keyring tls-creds-x509 memory-backend-file"
        " memory-backend-ram filter-dump input-linux authz-pam authz-list-file qtest iothread"
        " cryptodev-backend-lkcf can-host-socketcan sev-guest",
        "chardev": "file pipe serial parallel stdio pty socket udp ringbuf null spicevmc braille",
        "netdev": "user tap bridge socket stream dgram l2tpv3 vde netmap passt af-xdp hubport",
        "nic": "user tap bridge socket vde",
        "audiodev": "alsa oss pa wav none spice sndio jack pipewire dbus sdl",
        "display": "gtk sdl egl-headless dbus spice-app curses none",
        "fsdev": "local proxy synth",
        "virtfs": "local proxy synth",
    }
    keys = _VALUE_WORDS.split()
    parts = [draw(st.sampled_from(kinds[name].split()))] if name in kinds else []
    parts += [f"{key}={commas}" for key in draw(st.lists(st.sampled_from(keys), max_size=3))]
    parts += ["id=i"] * draw(st.booleans())
    if name in ("bios", "kernel", "initrd", "L", "k", "mem-path", "D", "option-rom", "serial",
                "vnc",                 "plugin", "readconfig"):  # fmt: skip
        return [f"-{name}", text]
    if name == "global":
        return ["-global", f"e1000.{draw(st.sampled_from(keys))}={text}"]
    if name in ("fw_cfg", "boot", "numa") and not parts:  # a bare word names nothing of the host
        parts = [f"file={commas}"]
    return [f"-{name}", ",".join(parts) or text]


def plan_of(lines: list[list[str]], *, here: bool) -> RestorePlan | None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            words = [word for line in lines for word in line]
            return Planner(Path(directory)).plan(*words, here=here, options={"clock": "host"})
        except StillframeError:
            return None


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(options(), min_size=1, max_size=3), st.booleans())
def test_nothing_of_the_host_is_named_without_trust(lines: list[list[str]], attached: bool) -> None:
    if attached:
        lines = [*lines, ["-device", "virtio-blk-pci,drive=q0"]]
    plan = plan_of(lines, here=False)
    if plan is None:
        return
    named = [word for word in plan.argv if MARK in GUESTS_TEXT.sub("", word)]
    if named and not plan.refusals:
        assert plan.needs_trust, named


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(options(), min_size=1, max_size=2))
def test_a_disk_of_the_first_vm_is_never_open_for_writing(lines: list[list[str]]) -> None:
    plan = plan_of([*lines, ["-device", "virtio-blk-pci,drive=q0"]], here=True)
    if plan is None or plan.refusals:
        return
    for name, value in zip(plan.argv, plan.argv[1:], strict=False):
        if name == "-blockdev" and MARK in value:
            tree = json.loads(value) if value.startswith("{") else dict(
                part.partition("=")[::2] for part in value.split(",")
            )  # fmt: skip
            assert tree.get("read-only") in (True, "on"), value
            assert '"read-only":false' not in value.replace(" ", ""), value
            assert ".read-only=off" not in value, value
        if name == "-drive" and MARK in value:
            assert "readonly=on" in value or "media=cdrom" in value, value


ODD = st.sampled_from(
    ["9" * 5000, "-1", "\u0663", "\u00b2", "1e999", "", "\ud800", "a\0b", "x" * 100_000,
     "a/../" * 9, "\x1b[2J", "\n-S", "{", "[" * 2000, "json:", "json:{}", "json:[1]",
     'json:{"driver":null}']
)  # fmt: skip
ODD_KEYS = st.sampled_from(
    ["index", "unit", "bus", "queues", "if", "id", "node-name", "driver", "file", "filename",
     "vnc", "path", "size", "offset", "x.y", ".."]
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(_OPTION_WORDS.split()),
    st.dictionaries(ODD_KEYS, st.one_of(ODD, st.none(), st.lists(ODD, max_size=1)), max_size=3),
    st.booleans(),
    ODD,
)
def test_odd_values_are_bad_input_at_the_most(
    name: str, tree: dict[str, Any], as_json: bool, text: str
) -> None:
    words = [f"{key}={value}" for key, value in tree.items()]
    value = json.dumps(tree) if as_json else ",".join(words) or text
    if "\0" not in value and "\ud800" not in value:  # no file can hold these
        plan_of([[f"-{name}", value]], here=False)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-drive", f"file={PATH}"], True),
        (["-blockdev", json.dumps({"driver": "raw", "file": {"filename": PATH}})], True),
        (["-drive", 'file=json:{"file":{"filename":"/srv/HOSTILE/x"}}'], True),
        (["-netdev", "user,id=n,guestfwd=tcp:1.2.3.4:5-cmd:ls"], True),
        (["-audiodev", "alsa,out.dev=file:'|id'"], True),
        (["-kernel", PATH], True),
        (["-append", "root=/dev/vda"], False),
        (["-smbios", "type=1,serial=ds=nocloud;s=http://10.0.2.2/"], False),
        (["-device", "virtio-net-pci,addr=0x3"], False),
        (["-chardev", "socket,path=/own/x,id=c"], False),
    ],
)
def test_the_second_reader(words: list[str], found: bool) -> None:
    assert bool(unaccounted(["q", *words], ["/own/x"], cwd="/", own=[])) == found
    assert not unaccounted(["q", *words], [], cwd="/", own=words)
