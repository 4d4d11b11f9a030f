"""Command lines read, expanded and brought up to date, without a QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.machine.qemu.config_file import Expansion
from stillframe.machine.qemu.drive_names import drive_names
from stillframe.machine.qemu.live_disks import DiskLine
from stillframe.machine.qemu.options import made, split, words
from stillframe.model import DiskRecord, ImageRecord


def line(text: str) -> list[str]:
    return ["qemu-system-x86_64", *text.split()]


@pytest.mark.parametrize(
    "text",
    [
        "-m 64 --device e1000,id=a disk.img -S -nographic --enable-kvm -cdrom x.iso",
        '-device {"driver":"e1000","id":"b"} -drive file=a,,b.img,snapshot -m',
        "",
    ],
)
def test_no_word_is_lost(text: str) -> None:
    assert words(split(line(text))) == text.split() + ([""] if text.endswith("-m") else [])


def test_options_are_changed_in_their_own_form() -> None:
    plain, json_ = split(line('--device e1000,id=a,mac=x -device {"driver":"e1000","addr":"3"}'))
    assert plain.changed({"addr": "4"}, without=("mac",)).words == (
        "--device",
        "e1000,id=a,addr=4",
    )
    assert json_.changed({"addr": "4", "id": "b"}).value == '{"driver":"e1000","addr":"4","id":"b"}'
    assert made("drive", {"file": "a,b", "snapshot": True}).value == "file=a,,b,snapshot=on"


def test_a_configuration_file_and_set(tmp_path: Path) -> None:
    text = '# qemu config file\n\n[device "x"]\n  driver = "VGA"\n[memory]\nsize = "64M"\n'
    (tmp_path / "c").write_text(text)
    expansion = Expansion(tmp_path)
    done = expansion.expand(split(line("-readconfig c -set device.x.vgamem_mb=32")))
    assert words(done) == ["-device", "VGA,id=x,vgamem_mb=32", "-m", "size=64M"]
    assert [file.text for file in expansion.files] == [text]
    assert expansion.notes == []


@pytest.mark.parametrize("text", ["no group", "[device]\nkey without value\n", "\xff[x]"])
def test_what_is_no_configuration_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "c").write_bytes(text.encode("latin-1"))
    expansion = Expansion(tmp_path)
    assert words(expansion.expand(split(line("-readconfig c")))) == ["-readconfig", "c"]
    assert len(expansion.notes) == 1
    assert expansion.files == []


def test_a_set_that_fits_nothing_stays() -> None:
    done = Expansion(Path("/")).expand(split(line("-set device.x.a=b -set odd")))
    assert words(done) == ["-set", "device.x.a=b", "-set", "odd"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("-hda a -cdrom b", ["ide0-hd0", "ide1-cd0"]),
        ("-drive file=a -drive file=b -drive file=c", ["ide0-hd0", "ide0-hd1", "ide1-hd0"]),
        ("-drive if=virtio,file=a -drive if=virtio,index=3,file=b", ["virtio0", "virtio3"]),
        ("-drive if=none,id=x,file=a a.img -fda f", ["x", "ide0-hd0", "floppy0"]),
        ("-drive if=scsi,unit=2,media=cdrom -drive if=pflash,file=x", ["scsi0-cd2", "pflash0"]),
    ],
)
def test_names_of_drives_without_id(text: str, names: list[str]) -> None:
    assert [name for _, name in drive_names(split(line(text)), ["ide1-cd0"])] == names


def test_names_of_drives_with_one_drive_on_a_bus() -> None:
    options = split(line("-hda a -hdb b -cdrom c"))
    names = [name for _, name in drive_names(options, ["ide2-cd0"], one_per_bus=True)]
    assert names == ["ide0-hd0", "ide1-hd0", "ide2-cd0"]


def disk(device: str, *files: str, qdev: str = "", driver: str = "file") -> DiskRecord:
    images = tuple(
        ImageRecord(
            node_name=f"#block{level}",
            driver=driver,
            format="qcow2",
            filename=file,
            read_only=level > 0,
            size_bytes=1,
        )
        for level, file in enumerate(files)
    )
    return DiskRecord(
        device=device,
        qdev=qdev,
        node_name="#block0" if files else "",
        filename=files[0] if files else "",
        driver="qcow2" if files else "",
        read_only=False,
        images=images,
    )


def updated(text: str, *disks: DiskRecord, devices: dict[str, str] | None = None) -> str:
    found = DiskLine(split(line(text)), disks, Path("/home"), "pc-i440fx-7.2-machine")
    return " ".join(words(found.update(devices or {})))


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("file=a.img", "/home/a.img"),
        ("file=file:/home/a.img", "/home/a.img"),
        ("file=/x/../home/a.img", "/home/a.img"),
        ("file.driver=file,file.filename=a.img", "a.img"),
    ],
)
def test_the_same_file_leaves_the_option(given: str, file: str) -> None:
    text = f"-drive if=virtio,{given}"
    assert updated(text, disk("virtio0", file)) == text


def test_a_drive_that_is_gone_and_one_that_changed() -> None:
    text = "-drive if=virtio,file=a,cache=none -drive if=virtio,file=b"
    assert updated(text, disk("virtio0", "/home/c")) == (
        "-drive if=virtio,cache=none,file=/home/c,format=qcow2"
    )


def test_a_network_image_that_may_have_changed_is_noted() -> None:
    found = DiskLine(
        split(line("-drive if=virtio,file=a")),
        [disk("virtio0", "nbd://host/x", driver="nbd")],
        Path("/"),
        "",
    )
    found.update({})
    assert "virtio0 is nbd://host/x now" in found.notes[0]


def test_a_recorded_network_image_is_left() -> None:
    text = "-drive if=virtio,file=nbd:host:10809"
    assert updated(text, disk("virtio0", "nbd://host:10809", driver="nbd")) == text


def test_nodes_that_nothing_leads_to_are_left_out() -> None:
    text = "-blockdev file,node-name=f,filename=/a -blockdev qcow2,node-name=q,file=f"
    device = "virtio-blk-pci,drive=q,id=d"
    changed = updated(
        f"{text} -device {device}",
        disk("", "/b", "/a", qdev="d"),
        devices={device: "/machine/peripheral/d"},
    )
    assert "node-name=f" not in changed
    assert '"filename":"/b"},"backing":"d-image-1"' in changed
    assert "-device virtio-blk-pci,drive=d-image-0,id=d" in changed
