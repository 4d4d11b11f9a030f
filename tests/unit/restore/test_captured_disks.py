"""Whether a snapshot's disk images are still what its manifest names."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from stillframe.disks.images import HEAD_BYTES, frozen_file
from stillframe.errors import DataError, HostError, NotFoundError
from stillframe.model import CapturedDisk, DiskRecord, Manifest
from stillframe.restore.captured_disks import captured_bases, check_captured
from stillframe.restore.read_right import let_read
from stillframe.store.records import own_disks

SIZE = HEAD_BYTES + 4096


def manifest(image: Path, *, digest: bool) -> Manifest:
    file = frozen_file(str(image), "raw", shown_as=image.name, digest=digest)
    disk = CapturedDisk(
        device="d0", qdev="q", node_name="n", kind="copy", virtual_size_bytes=SIZE, files=(file,)
    )
    return Manifest(
        created="", mode="background", stillframe_version="", stream_bytes=0, blocks=(),
        captured_disks=(disk,),
    )  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_an_untouched_image_is_taken(image: Path) -> None:
    for digest in (False, True):
        record = manifest(image, digest=digest)
        notes = check_captured(record, image.parent / "x.still", digests=True)
        assert len(notes) == (not digest)
        (base,) = captured_bases(record, image.parent / "x.still")
        assert base.backing == str(image)
        drive = DiskRecord(
            device="d0", qdev="q", node_name="", filename="", driver="", read_only=False
        )
        assert base.is_of(drive)
        assert not base.is_of(msgspec.structs.replace(drive, device="d1"))


def test_a_longer_one_is_not(image: Path) -> None:
    record = manifest(image, digest=True)
    with image.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="bytes, and had"):
        check_captured(record, image.parent / "x.still")


@pytest.mark.parametrize(
    ("at", "digest", "verify", "why"),
    [
        (0, False, False, "first MiB"),
        (0, True, True, "first MiB"),
        (HEAD_BYTES, False, False, "written to since"),
        (HEAD_BYTES, True, True, "digest"),
    ],
)
def test_a_changed_byte_is_found(
    image: Path, at: int, digest: bool, verify: bool, why: str
) -> None:
    record = manifest(image, digest=digest)
    with image.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(image, ns=(1, 1))
    with pytest.raises(DataError, match=why):
        check_captured(record, image.parent / "x.still", digests=verify)


def test_a_copy_may_be_moved_with_its_snapshot(image: Path, tmp_path: Path) -> None:
    record = manifest(image, digest=True)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "disk").write_bytes(image.read_bytes())
    check_captured(record, other / "x.still", digests=True)


def test_a_missing_one_is_named(image: Path) -> None:
    record = manifest(image, digest=True)
    image.unlink()
    with pytest.raises(NotFoundError, match=str(image)):
        check_captured(record, image.parent / "x.still")


def test_the_right_to_read_is_for_that_very_file(image: Path) -> None:
    """Who owns the directory may put a link to something else there meanwhile."""
    record, snapshot = manifest(image, digest=True), image.parent / "x.still"
    image.chmod(0o600)
    try:
        let_read(record, snapshot, ["d0"], 65534)
    except HostError:
        pytest.skip("missing ACLs: the file system of the test's directory has none")
    assert "system.posix_acl_access" in os.listxattr(image)
    secret = image.with_name("secret")
    secret.write_bytes(os.urandom(SIZE))
    secret.chmod(0o600)
    image.unlink()
    image.symlink_to(secret)
    with pytest.raises(DataError, match="first MiB"):
        let_read(record, snapshot, ["d0"], 65534)
    assert "system.posix_acl_access" not in os.listxattr(secret)


def named(path: Path, snapshot: str, *, kind: str = "copy") -> Manifest:
    """A disk that was beside a snapshot of that name, and is at ``path`` now."""
    record = manifest(path, digest=True)
    (disk,) = record.captured_disks
    file = msgspec.structs.replace(disk.files[0], path=f"{snapshot}.disks/{path.name}")
    moved = msgspec.structs.replace(disk, files=(file,), kind=kind)
    return msgspec.structs.replace(record, captured_disks=(moved,))


def test_a_copy_may_be_renamed_with_its_snapshot(tmp_path: Path) -> None:
    place = tmp_path / "new.still.disks" / "disk"
    place.parent.mkdir()
    place.write_bytes(os.urandom(SIZE))
    place.chmod(0o600)
    record, snapshot = named(place, "old.still"), tmp_path / "new.still"
    (base,) = captured_bases(record, snapshot)
    assert base.backing == str(place)
    check_captured(record, snapshot, digests=True)
    assert [key for key, _ in own_disks(record, "new")] == ["snapshots/new.still.disks/disk"]
    try:
        let_read(record, snapshot, ["d0"], 65534)
    except HostError as error:
        if "ACL" not in str(error):
            raise
        pytest.skip("missing ACLs: the file system of the test's directory has none")


def test_what_lies_on_another_snapshots_disk_does_not_own_it(tmp_path: Path) -> None:
    """A clone's overlay lies on the disk of the snapshot that it was started from."""
    place = tmp_path / "first.still.disks" / "disk"
    place.parent.mkdir()
    place.write_bytes(os.urandom(SIZE))
    record = named(place, "first.still", kind="overlay")
    assert own_disks(record, "second") == []
    (base,) = captured_bases(record, tmp_path / "second.still")
    assert base.backing == str(place)
