"""What becomes of a recorded domain XML, and what it names of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from stillframe.errors import DataError, RefusedError
from stillframe.model import CapturedDisk, FrozenFile
from stillframe.restore.captured_disks import CapturedBase, CapturedDisks
from stillframe.restore.domain_xml import note_touches, own_devices
from stillframe.restore.ledger import Ledger
from stillframe.restore.places import Places
from stillframe.still.export_libvirt import parse_domain

DISK = """<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2'/>
<source {source}/><backingStore type='file'/><target dev='{dev}' bus='{bus}'/>{more}</disk>"""


def disk(source: str, *, kind: str = "file", dev: str = "vda", more: str = "") -> str:
    return DISK.format(kind=kind, source=source, dev=dev, bus="virtio", more=more)


def captured(*qdevs: str, image_format: str = "qcow2") -> CapturedDisks:
    bases = []
    for number, qdev in enumerate(qdevs):
        path = f"/copies/{number}.qcow2"
        file = FrozenFile(
            path=path, format=image_format, size_bytes=1, mtime_ns=0, head="", digest=""
        )
        bases.append(
            CapturedBase(
                disk=CapturedDisk(
                    device="",
                    qdev=qdev,
                    node_name=f"libvirt-{number}-format",
                    kind="copy",
                    virtual_size_bytes=1,
                    files=(file,),
                ),
                label=qdev,
                backing=path,
                backing_format=image_format,
                virtual_size_bytes=1,
                files=(path,),
            )
        )
    return CapturedDisks(bases)


class Rewritten:
    """A domain with these devices, rewritten."""

    def __init__(self, devices: str, disks: CapturedDisks | None = None, os: str = "") -> None:
        text = f"<domain><os>{os}</os><devices>{devices}</devices></domain>"
        self.root = ElementTree.fromstring(text)
        live = ElementTree.fromstring(text)
        self.ledger = Ledger(Places(run=Path("/own"), disks=Path("/own")))
        own_devices(self.root, live, self.ledger, disks or CapturedDisks())
        note_touches(self.root, self.ledger)

    def get(self, path: str, key: str) -> str | None:
        element = self.root.find(path)
        assert element is not None
        return element.get(key)

    @property
    def targets(self) -> set[str]:
        return {touch.target for touch in self.ledger.touches}


@pytest.mark.parametrize(
    ("qdev", "alias"),
    [("/machine/peripheral/virtio-disk0/virtio-backend", "virtio-disk0"),
     ("scsi0-0-0-0", "scsi0-0-0-0"), ("/machine/peripheral/ua-mine/virtio-backend", "ua-mine")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "source"),
    [("file", "file='/a.img'"), ("block", "dev='/dev/x'"), ("network", "protocol='nbd' name='n'"),
     ("volume", "pool='p' volume='v'")],
)  # fmt: skip
def test_a_disk_of_the_instant(qdev: str, alias: str, kind: str, source: str) -> None:
    """By libvirt's own name for it; whatever the disk of now is on."""
    more = f"<alias name='{alias}'/><shareable/>"
    disks = captured("other", qdev)
    made = Rewritten(disk(source, kind=kind, more=more), disks)
    (overlay,) = made.ledger.overlays
    assert (overlay.base, overlay.captured) == ("/copies/1.qcow2", qdev)
    assert [base.label for base in disks.unplaced()] == ["other"]
    assert made.get("devices/disk/source", "file") == overlay.overlay == "/own/disk0.qcow2"
    assert made.get("devices/disk", "type") == "file"
    assert made.root.find("devices/disk/shareable") is None
    assert made.root.find("devices/disk/backingStore") is None
    assert "/copies/1.qcow2" in made.targets


def test_a_disk_as_it_is_now(tmp_path: Path) -> None:
    made = Rewritten(disk(f"file='{tmp_path}/a'"))
    (overlay,) = made.ledger.overlays
    assert (overlay.base, overlay.base_format, overlay.captured) == (f"{tmp_path}/a", "qcow2", "")
    assert any("as they are now" in note for note in made.ledger.notes)


@pytest.mark.parametrize(
    ("devices", "disks"),
    [
        (disk("protocol='nbd' name='n'", kind="network"), None),
        (disk("file='/a'", more="<encryption format='luks'/>"), None),
        (disk("file='/a'", more="<alias name='l'/>"), captured("l", image_format="luks")),
    ],
)
def test_what_libvirt_cannot_be_told(devices: str, disks: Any) -> None:
    with pytest.raises(RefusedError, match="overlay over disk vda"):
        Rewritten(devices, disks)


@pytest.mark.parametrize(
    "device",
    [
        "<hostdev mode='subsystem' type='pci'/>",
        "<filesystem type='mount'/>",
        "<shmem name='x'/>",
        "<tpm model='tpm-crb'/>",
        "<vsock model='virtio'/>",
        "<interface type='hostdev'/>",
        "<interface type='vhostuser'/>",
        "<serial type='dev'><source path='/dev/ttyS0'/></serial>",
        "<serial type='unix'><source mode='connect' path='/s'/></serial>",
    ],
)
def test_what_cannot_be_had_twice(device: str) -> None:
    with pytest.raises(RefusedError):
        Rewritten(device)


def test_its_own_lines_displays_and_cards() -> None:
    made = Rewritten(
        "<serial type='unix'><source mode='bind' path='/old/s'/><log file='/old/log'/></serial>"
        "<channel type='unix'><source mode='bind' path='/old/c'/></channel>"
        "<console type='pty'><source path='/dev/pts/1'/></console>"
        "<graphics type='vnc' port='5900' autoport='no' socket='/old/vnc'>"
        "<listen type='socket' socket='/old/vnc'/></graphics>"
        "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>"
        "<target dev='vnet0'/></interface>"
    )
    assert not [target for target in made.targets if "/old" in target or "pts" in target]
    assert made.get("devices/serial/source", "path") == "/own/serial-s"
    assert made.get("devices/graphics", "port") == "-1"
    assert made.get("devices/interface/mac", "address") != "52:54:00:00:00:01"
    assert made.root.find("devices/interface/target") is None
    assert "network default" in made.targets


def test_firmwares_variables_are_copied() -> None:
    made = Rewritten("", os="<loader>/usr/share/OVMF/C.fd</loader><nvram>/v/vars.fd</nvram>")
    (copy,) = made.ledger.overlays
    assert (copy.base, copy.kind) == ("/v/vars.fd", "copy")
    assert made.root.findtext("os/nvram") == copy.overlay
    assert not made.root.findtext("os/nvram", "").startswith("/v/")


def test_all_that_the_xml_names_is_listed() -> None:
    made = Rewritten(
        "<emulator>/evil/qemu</emulator>"
        "<disk type='file' device='cdrom'><source file='/etc/shadow'/><target dev='sda'/>"
        "<readonly/></disk>"
        "<interface type='ethernet'><script path='/evil/up'/></interface>"
        "<rng><backend model='random'>/dev/sda</backend></rng>",
        os="<kernel>/root/kernel</kernel>",
    )
    assert {"/evil/qemu", "/etc/shadow", "/evil/up", "/dev/sda", "/root/kernel"} <= made.targets
    reasons = " ".join(risk.reason for risk in made.ledger.risks)
    assert "/etc/shadow" in reasons


@pytest.mark.parametrize(
    ("devices", "target"),
    [
        ("<disk type='file'><source file='relative'/><target dev='a'/><readonly/></disk>",
         "relative"),
        ("<redirdev bus='usb' type='tcp'><source mode='connect' host='evil' service='1'/>"
         "</redirdev>", "host evil"),
        ("<rng model='virtio'><backend model='egd' type='udp'><source mode='connect' host='evil'"
         " service='1'/></backend></rng>", "host evil"),
        ("<audio id='1' type='alsa'/>", "the host's sound, by alsa"),
        ("<graphics type='vnc' listen='0.0.0.0'/>", "0.0.0.0"),
    ],
)  # fmt: skip
def test_what_has_no_path_is_listed_too(devices: str, target: str) -> None:
    made = Rewritten(devices)
    assert target in made.targets
    assert made.ledger.risks


def test_a_sound_device_may_be_a_program() -> None:
    made = Rewritten("<audio id='1' type='oss'><output dev=\"file:'|id'\"/></audio>")
    assert any("|id" in risk.reason for risk in made.ledger.risks)


@pytest.mark.parametrize("more", ["", "<readonly/>"])
def test_what_the_header_of_a_disk_names_is_listed(tmp_path: Path, more: str) -> None:
    image = tmp_path / "i"
    header = b"QFI\xfb" + (2).to_bytes(4, "big") + (72).to_bytes(8, "big") + (9).to_bytes(4, "big")
    image.write_bytes(header.ljust(72, b"\0") + b"/etc/evil")
    assert "/etc/evil" in Rewritten(disk(f"file='{image}'", more=more)).targets


@pytest.mark.parametrize("xml", ["", "<domain>", "<d>" * 2000 + "</d>" * 2000, "&x;"])
def test_xml_that_is_no_domains(xml: str) -> None:
    with pytest.raises(DataError, match=r"malformed|too deeply"):
        parse_domain(xml)
