"""What a disk image names in its header is in the plan: QEMU opens it with the image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stillframe.disks.images import frozen_file
from stillframe.errors import DataError
from stillframe.model import CapturedDisk
from stillframe.restore.image_headers import named_in
from stillframe.restore.records import RestorePlan
from tests.support.probes import has_qemu
from tests.unit.restore.recorded import Planner, machine

pytestmark = pytest.mark.qemu


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    has_qemu().require()
    return Planner(tmp_path)


def create(*words: str, at: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", *words], check=True, cwd=at)


def read(plan: RestorePlan) -> set[str]:
    return {touch.target for touch in plan.touches if touch.access == "read"}


BACKED = {
    "qcow2": ["-f", "qcow2", "-b", "below", "-F", "raw"],
    "qcow2 of old": ["-f", "qcow2", "-o", "compat=0.10", "-b", "below", "-F", "raw"],
    "qcow2 with large clusters": ["-f", "qcow2", "-o", "cluster_size=2M", "-b", "below",
                                  "-F", "raw"],
    "qcow": ["-f", "qcow", "-b", "below", "-F", "raw"],
    "qed": ["-f", "qed", "-b", "below", "-F", "raw"],
    "json": ["-f", "qcow2", "-u", "-F", "raw", "-b",
             'json:{"driver":"raw","file":{"driver":"file","filename":"PLACE/below"}}'],
    "json in json": ["-f", "qcow2", "-u", "-F", "qcow2", "-b",
                     'json:{"driver":"qcow2","file":{"driver":"file","filename":"PLACE/above"},'
                     '"backing":{"driver":"file","filename":"PLACE/below"}}'],
    "with a protocol": ["-f", "qcow2", "-u", "-F", "raw", "-b", "file:PLACE/below"],
}  # fmt: skip


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("name", BACKED)
def test_a_backing_file(planner: Planner, name: str, probed: bool) -> None:
    here = planner.directory
    (here / "below").write_bytes(bytes(1 << 20))
    create("-f", "qcow2", "above", "1M", at=here)
    words = [word.replace("PLACE", str(here)) for word in BACKED[name]]
    create(*words, "image", "1M", at=here)
    image_format = "" if probed else f",format={words[1]}"
    plan = planner.plan("-drive", f"file={here}/image{image_format},if=virtio")
    assert read(plan) >= {f"{here}/image", f"{here}/below"}
    assert any(f"below, which the header of {here}/" in risk.reason for risk in plan.risks)
    assert not planner.plan("-drive", f"file={here}/image,if=virtio", here=True).needs_trust


def test_the_parent_of_a_vmdk(planner: Planner) -> None:
    here = planner.directory
    create("-f", "vmdk", "below", "1M", at=here)
    create("-f", "vmdk", "-b", "below", "-F", "vmdk", "image", at=here)
    assert f"{here}/below" in read(planner.plan("-hda", "image"))


def test_extents_in_files_of_their_own(planner: Planner) -> None:
    here = planner.directory
    create("-f", "vmdk", "-o", "subformat=monolithicFlat", "image.vmdk", "1M", at=here)
    assert f"{here}/image-flat.vmdk" in read(planner.plan("-hda", "image.vmdk"))


def test_a_data_file(planner: Planner) -> None:
    here = planner.directory
    create("-f", "qcow2", "-o", f"data_file={here}/other", "image", "1M", at=here)
    assert f"{here}/other" in read(planner.plan("-hda", "image"))


@pytest.mark.parametrize("name", ["nbd://10.0.0.1/x", "blkdebug:/etc/x:/d", "exec:id", "json:{"])
def test_what_is_no_file(planner: Planner, name: str) -> None:
    create("-f", "qcow2", "-u", "-b", name, "-F", "raw", "image", "1M", at=planner.directory)
    plan = planner.plan("-drive", "file=image,if=virtio,format=qcow2")
    assert any(name.split(":")[0] in risk.reason for risk in plan.risks)


def test_a_header_that_is_not_read(planner: Planner) -> None:
    """It is on a network, or somewhere within another image."""
    inner = '"file":{"driver":"file","filename":"/d"}'
    for file in (f'{{"driver":"raw","offset":512,{inner}}}', '{"driver":"nbd","host":"h"}'):
        node = f'{{"driver":"qcow2","node-name":"n","file":{file}'
        plan = planner.plan("-blockdev", node + "}")
        assert any("not known before" in risk.reason for risk in plan.risks)
        plan = planner.plan("-blockdev", node + ',"backing":null}')
        assert not any("not known before" in risk.reason for risk in plan.risks)


def test_a_circle_ends(planner: Planner) -> None:
    here = planner.directory
    for name, other in (("a", "b"), ("b", "a")):
        create("-f", "qcow2", "-u", "-b", other, "-F", "qcow2", name, "1M", at=here)
    assert read(planner.plan("-hda", "a")) == {f"{here}/a", f"{here}/b"}


def test_a_circle_by_way_of_a_node_on_a_network_ends(planner: Planner) -> None:
    here = planner.directory
    own = '{"driver":"qcow2","file":{"driver":"file","filename":"PLACE/a"},"backing":REMOTE}'
    remote = '{"driver":"nbd","server":{"type":"inet","host":"10.0.0.1","port":"1"}}'
    name = "json:" + own.replace("PLACE", str(here)).replace("REMOTE", remote)
    create("-f", "qcow2", "-o", "data_file=x,data_file_raw=on", "a", "4K", at=here)
    data = bytearray((here / "a").read_bytes())
    at = data.index(b"DATA")
    text = name.encode() + bytes(-len(name) % 8)
    data[at : at + 8 + len(text) + 8] = (
        b"DATA" + len(name).to_bytes(4, "big") + text + bytes(8)  # and the end of the extensions
    )
    (here / "a").write_bytes(data)
    assert any("10.0.0.1" in touch.target for touch in planner.plan("-hda", "a").touches)


def test_the_command_line_goes_before_the_header(planner: Planner) -> None:
    here = planner.directory
    create("-f", "qcow2", "-u", "-b", "below", "-F", "raw", "image", "1M", at=here)
    node = (
        f'{{"driver":"qcow2","node-name":"n","file":{{"driver":"file","filename":"{here}/image"}}'
    )
    for backing in (',"backing":null}', ',"backing":{"driver":"null-co"}}'):
        assert read(planner.plan("-blockdev", node + backing)) == {f"{here}/image"}
    assert read(planner.plan("-blockdev", node + "}")) == {f"{here}/image", f"{here}/below"}
    # What a guest wrote into a raw image is no header.
    assert read(planner.plan("-drive", "file=image,format=raw,if=virtio")) == {f"{here}/image"}


def test_headers_that_are_cut_off(planner: Planner) -> None:
    here = planner.directory
    create("-f", "qcow2", "-u", "-b", "below", "-F", "raw", "image", "1M", at=here)
    whole = (here / "image").read_bytes()
    for size in (0, 3, 4, 7, 20, 72, 100, 104, 110, 130):
        (here / "image").write_bytes(whole[:size])
        assert f"{here}/image" in read(planner.plan("-hda", "image"))


def captured(image: Path, image_format: str = "qcow2") -> CapturedDisk:
    file = frozen_file(str(image), image_format, shown_as=image.name)
    return CapturedDisk(
        device="d0", qdev="", node_name="n0", kind="copy", virtual_size_bytes=1 << 20, files=(file,)
    )


@pytest.mark.parametrize(
    "words",
    [
        ["-drive", "file=gone,if=none,id=d0,format=raw"],
        ["-blockdev", '{"driver":"file","node-name":"n0","filename":"/gone"}',
         "-device", "virtio-blk-pci,drive=n0"],
    ],
)  # fmt: skip
def test_a_disk_of_the_instant(planner: Planner, words: list[str]) -> None:
    """Its copy comes with the file, so its header is somebody else's word, too."""
    here = planner.directory
    create("-f", "qcow2", "-u", "-b", "/etc/below", "-F", "raw", "image", "1M", at=here)
    disk = captured(here / "image")
    plan = planner.plan_record(machine(words), captured=[disk])
    assert read(plan) >= {f"{here}/image", "/etc/below"}
    assert any("/etc/below, which the header of" in risk.reason for risk in plan.risks)
    create("-f", "qcow2", "-u", "-b", "exec:id", "-F", "raw", "image", "1M", at=here)
    plan = planner.plan_record(machine(words), captured=[captured(here / "image")])
    assert any("names exec:id" in risk.reason for risk in plan.risks)
    with pytest.raises(DataError, match="does not know the block driver vvfat"):
        planner.plan_record(machine(words), captured=[captured(here / "image", "vvfat")])


@pytest.mark.parametrize(
    "words",
    [
        '{"driver":"raw","read-only":false,"file":{"driver":"file","filename":"/d"}}',
        '{"driver":"qcow2","file":{"driver":"file","read-only":false,"filename":"/d"}}',
        '{"driver":"copy-on-read","file":{"driver":"file","filename":"/d"}}',
        '{"driver":"raw","auto-read-only":true,"file":{"driver":"file","filename":"/d"}}',
    ],
)
def test_a_header_does_not_say_how_to_open(planner: Planner, words: str) -> None:
    """QEMU takes it literally, and would open the file for writing."""
    create("-f", "qcow2", "-u", "-b", f"json:{words}", "-F", "raw", "i", "1M", at=planner.directory)
    plan = planner.plan("-drive", "file=i,if=virtio,format=qcow2")
    assert any("it says how it is opened" in risk.reason for risk in plan.risks)


def test_a_second_data_file(planner: Planner) -> None:
    """Behind the end of the extensions there may be whatever looks like one."""
    here = planner.directory
    create("-f", "qcow2", "-o", "data_file=evil,data_file_raw=on", "image", "4K", at=here)
    data = bytearray((here / "image").read_bytes())
    at = data.index(b"DATA") + 8 + 8
    harmless = b"DATA" + (4).to_bytes(4, "big") + b"good" + bytes(4)
    (here / "image").write_bytes(data[:at] + harmless + data[at + len(harmless) :])
    assert {f"{here}/evil", f"{here}/good"} <= read(planner.plan("-hda", "image"))
    data[8:20] = at.to_bytes(8, "big") + (4).to_bytes(4, "big")  # the backing file's name begins
    (here / "image").write_bytes(data[:at] + harmless + data[at + len(harmless) :])
    plan = planner.plan("-hda", "image")
    assert f"{here}/evil" in read(plan)
    assert f"{here}/good" not in read(plan)


def vmdk(at: int, text: str) -> bytes:
    """A sparse extent whose header says that its descriptor is in sector ``at``."""
    head = b"KDMV" + bytes(24) + at.to_bytes(8, "little") + (1).to_bytes(8, "little")
    return head.ljust(at * 512, b"\0") + text.encode()


@pytest.mark.parametrize(
    "text",
    [
        '# x\n\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "evil" 0\n',
        'version=1\n  RW\t8FLAT\n"evil"',
        'version=1\nRW -8 VMFSSPARSE"evil"',
        'version=1\nx=parentFileNameHint="evil"',
        'version=1\nparentFileNameHint = evil" x',
    ],
)
def test_odd_descriptors(planner: Planner, text: str) -> None:
    """As QEMU's scanf and strstr read them."""
    place = planner.directory / "d"
    place.write_text(text)
    assert [named.name.strip() for named in named_in(str(place), "")] == ["evil"]
    place.write_text("encoding=utf-8\n" + text)  # not probed then
    assert [named.name.strip() for named in named_in(str(place), "vmdk")] == ["evil"]
    assert not named_in(str(place), "")
    place.write_bytes(vmdk(3, text))
    assert [named.name.strip() for named in named_in(str(place), "")] == ["evil"]


def test_a_descriptor_that_is_too_far_behind(planner: Planner) -> None:
    (planner.directory / "d").write_bytes(vmdk(1 << 20, "")[:4096])
    plan = planner.plan("-hda", "d")
    assert any("stands too far behind" in risk.reason for risk in plan.risks)


@pytest.mark.parametrize("data", [b"# " * 500_000, b"version=1\n" + b"\n" * 1_000_000,
                                  b"version=1\n" + b"RW 1" * 200_000,
                                  b"version=1\n" + b"parentFileNameHint=" * 50_000])  # fmt: skip
def test_a_descriptor_takes_no_long_reading(planner: Planner, data: bytes) -> None:
    """These took minutes, or for ever."""
    (planner.directory / "d").write_bytes(data)
    assert not named_in(str(planner.directory / "d"), "")
