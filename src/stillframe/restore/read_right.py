"""The right of a VM's user to read the copies of its disks, which root took (acl(5)).

An ACL names that one user; a group may have other members. Content and time stay as they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection

from stillframe.errors import HostError
from stillframe.model import Manifest
from stillframe.restore.captured_disks import check_file, disk_label, place_of

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 0x10, 0x20
_READ, _READ_WRITE, _NOBODY = 4, 6, 0xFFFFFFFF


def let_read(
    manifest: Manifest, snapshot_path: str | os.PathLike[str], only: Collection[str], uid: int
) -> None:
    """Give one user the right to read the copies of some disks.

    Args:
        only: the labels of the disks.

    Raises:
        HostError: a copy cannot be opened, or the file system has no ACLs. DataError: it is
            another file than a moment ago.
    """
    entries = [(_USER_OBJ, _READ_WRITE, _NOBODY), (_USER, _READ, uid), (_GROUP_OBJ, 0, _NOBODY)]
    entries += [(_MASK, _READ, _NOBODY), (_OTHER, 0, _NOBODY)]
    acl = struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    for disk in manifest.captured_disks:
        if disk.kind != "copy" or disk_label(disk) not in only:
            continue
        for file in disk.files:
            path = place_of(file, disk, snapshot_path)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise HostError(f"cannot read {path}", why=error.strerror) from error
            try:
                status = os.fstat(fd)
                # A file that its owner has shared, or given away, is the owner's business.
                if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                    continue
                # Check this very file, not what has its name now: the directory may be another's.
                check_file(f"/proc/self/fd/{fd}", file, shown_as=str(path))
                os.setxattr(fd, _ATTRIBUTE, acl)
            except OSError as error:
                raise HostError(
                    f"the VM's user ({uid}) may not read {path}",
                    why=f"an ACL could not be set ({error.strerror})",
                    remedy="give that user the right to read it",
                ) from error
            finally:
                os.close(fd)
