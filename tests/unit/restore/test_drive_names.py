"""QEMU's names for drives without an id (what its monitor shows, checked with 7.2)."""

from __future__ import annotations

import pytest

from stillframe.errors import DataError
from stillframe.restore.drive_names import drive_names
from stillframe.restore.option import split_options


@pytest.mark.parametrize(
    ("machine", "words", "names"),
    [
        ("pc-i440fx-7.2", ["-hda", "a", "-hdb", "b", "-hdc", "c"],
         ["ide0-hd0", "ide0-hd1", "ide1-hd0"]),
        ("pc-q35-7.2", ["-hda", "a", "-hdb", "b", "-cdrom", "c"],
         ["ide0-hd0", "ide1-hd0", "ide2-cd0"]),
        ("pc-i440fx-7.2", ["c", "-drive", "file=a", "-drive", "file=b"],
         ["ide0-hd0", "ide0-hd1", "ide1-hd0"]),
        ("pc-q35-7.2", ["-drive", "file=a,if=virtio", "-drive", "file=b,if=virtio"],
         ["virtio0", "virtio1"]),
        ("pc-q35-7.2", ["-drive", "file=a,if=virtio,index=3", "-drive", "file=b,if=virtio"],
         ["virtio3", "virtio0"]),
        ("pc-q35-7.2", ["-drive", "file=a,if=scsi", "-drive", "file=a,if=scsi,bus=1,unit=2"],
         ["scsi0-hd0", "scsi1-hd2"]),
        ("pc-q35-7.2", ["-drive", "file=a,if=none,id=x", "-drive", "file=b,if=none"], ["none1"]),
        ("pc-i440fx-7.2", ["-drive", "file=a,bus=0", "-drive", "file=b,bus=0",
                           "-drive", "file=c,bus=0", "-drive", "file=d,bus=1"],
         ["ide0-hd0", "ide0-hd1", "ide1-hd0", "ide1-hd1"]),
        ("virt-7.2", ["-drive", "file=a", "-pflash", "f", "-fda", "g"],
         ["virtio0", "pflash0", "floppy0"]),
    ],
)  # fmt: skip
def test_names(machine: str, words: list[str], names: list[str]) -> None:
    recorded = split_options(words, DataError)
    assert list(drive_names(recorded, machine).values()) == names
