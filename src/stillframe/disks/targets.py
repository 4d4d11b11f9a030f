"""The target of a disk's copy: a file with its room reserved, and no name until it is complete.

QEMU gets the file as a descriptor, so it needs no access to the path; whichever process dies, the
file vanishes with its last descriptor (open(2): O_TMPFILE). Space is reserved beyond the file's end
(fallocate(2): FALLOC_FL_KEEP_SIZE): when a copy has no room for the data that a guest's write is
about to replace, QEMU stops the guest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from stillframe.disks.images import qemu_img
from stillframe.errors import RefusedError, SinkError, UsageError

_FALLOC_FL_KEEP_SIZE = 1
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_FAR_AWAY = ("nfs", "cifs", "smb", "ceph", "gluster", "9p", "fuse", "afs", "lustre", "virtiofs")
_COPIES = f"*-{'[0-9a-f]' * 8}.[qr]*"
"""The pattern of the copies' file names."""
_libc = ctypes.CDLL(None, use_errno=True)


def reserve_room(fd: int, length_bytes: int) -> int:
    """Reserve room for a file, beyond its end if need be; return 0, or the error's number."""
    length = ctypes.c_long(length_bytes)
    failed = _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), length)
    return ctypes.get_errno() if failed else 0


class TargetDirectory:
    """The directory of a snapshot's copies; made when the first copy gets its name.

    Raises:
        RefusedError: it is on a file system of another machine or process, which may hang the
            guest.
        SinkError: its parent directory does not exist.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self._made = False
        self.place = self.path if self.path.is_dir() else self.path.parent
        """The directory for unnamed files, on the same file system."""
        if not self.place.is_dir():
            raise SinkError(
                f"there is no directory {self.place}",
                remedy="make it, or name another one with --disks-dir",
                guest_state="running",
            )
        kind = _file_system(self.place)
        if kind.startswith(_FAR_AWAY):
            raise RefusedError(
                "disks-directory",
                why=f"{self.place} is on {kind}: where that stands still, so would the guest",
                remedy="name a directory on a local file system with --disks-dir",
            )

    def make(self) -> None:
        """Make the directory, unless it exists.

        Raises:
            SinkError: it cannot be made.
        """
        try:
            self.path.mkdir(mode=0o711)  # a VM of another user must get to its copies
            self._made = True
        except FileExistsError:
            pass
        except OSError as error:
            raise _sink_error(f"cannot make the directory {self.path}", error) from error

    def remove_all_but(self, files: Collection[Path]) -> None:
        """Remove the copies of a snapshot that this one replaced: no other uses the directory.
        Never raises."""
        with contextlib.suppress(OSError):
            for path in self.path.glob(_COPIES):
                if path not in files:
                    path.unlink()

    def remove_if_empty(self) -> None:
        """Remove the directory if we made it; never raises."""
        if self._made:
            with contextlib.suppress(OSError):
                self.path.rmdir()


class Target:
    """One file. Close it on every path; without :meth:`give_name` nothing of it remains.

    Raises:
        SinkError: it cannot be made.
    """

    def __init__(self, directory: TargetDirectory, label: str, *, suffix: str = "qcow2") -> None:
        self._parent = directory
        self._directory = directory.path
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in label).lstrip(".")[:40]
        self.path = self._directory / f"{safe or 'disk'}-{secrets.token_hex(4)}.{suffix}"
        self._hidden: Path | None = None
        self._named = False
        self.reserved_bytes = 0
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self.fd = os.open(directory.place, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise _sink_error(f"cannot make a file in {directory.place}", error) from error
            self._hidden = directory.place / f".{self.path.name}.part"
            try:
                self.fd = os.open(self._hidden, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as again:
                raise _sink_error(f"cannot make {self._hidden}", again) from again

    def format_qcow2(self, virtual_size_bytes: int) -> None:
        """Format the file as an empty image of that size.

        Raises:
            HostError: qemu-img is missing or fails.
        """
        name = f"/proc/self/fd/{self.fd}"
        words = ["create", "-q", "-f", "qcow2", "-o", "compat=1.1", name, str(virtual_size_bytes)]
        qemu_img(words, f"cannot make the copy {self.path}", pass_fds=[self.fd])

    def reserve(self, length_bytes: int, label: str) -> None:
        """Reserve room so that the copy does not run out of it.

        Raises:
            SinkError: there is not enough.
        """
        code = reserve_room(self.fd, length_bytes)
        if code == 0:
            self.reserved_bytes = max(self.reserved_bytes, length_bytes)
            return
        status = os.fstatvfs(self.fd)
        free_bytes = status.f_bavail * status.f_frsize
        if code != errno.EOPNOTSUPP or free_bytes < 2 * length_bytes:
            raise SinkError(
                f"no room for the copy of disk {label}",
                why=f"it needs up to {length_bytes >> 20} MiB, and {self._directory} has"
                f" {free_bytes >> 20} MiB free ({os.strerror(code)})",
                remedy="make room, name another directory with --disks-dir, or leave the disks"
                " out with --disks none",
                guest_state="running",
            )
        self.reserved_bytes = max(self.reserved_bytes, length_bytes)  # there is twice as much

    def set_length(self, length_bytes: int) -> None:
        """Set the file's own length, where the image is as long as the disk."""
        os.ftruncate(self.fd, length_bytes)

    def seal(self) -> None:
        """Release the reserved room that was not needed, and make the content durable.

        Raises:
            SinkError: it could not all be written.
        """
        try:
            length_bytes = os.fstat(self.fd).st_size
            os.ftruncate(self.fd, length_bytes + 1)
            os.ftruncate(self.fd, length_bytes)
            os.fsync(self.fd)
        except OSError as error:
            raise _sink_error(f"cannot finish the copy {self.path}", error) from error

    def give_name(self) -> None:
        """Make the file appear under its name, durably.

        Raises:
            SinkError: it cannot be named.
        """
        self._parent.make()
        try:
            if self._hidden is not None:
                self._hidden.rename(self.path)
                self._hidden, self._named = None, True
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not self._named:
                    # With dir_fd, os.link follows /proc's link (linkat(2): AT_SYMLINK_FOLLOW).
                    source = f"/proc/self/fd/{self.fd}"
                    os.link(source, self.path.name, dst_dir_fd=directory, follow_symlinks=True)
                    self._named = True
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise _sink_error(f"cannot name the copy {self.path}", error) from error

    def close(self, *, keep: bool) -> None:
        """Close the file; the second call does nothing. Never raises.

        Args:
            keep: it belongs to a finished snapshot.
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(OSError):
            if self._hidden is not None:
                self._hidden.unlink(missing_ok=True)
            if self._named and not keep:
                self.path.unlink(missing_ok=True)
                self._named = False


def need_directory(directory: str | None) -> str:
    """Return the directory.

    Raises:
        UsageError: there is none, because the snapshot goes to no file.
    """
    if directory is None:
        raise UsageError(
            "the copies of the VM's disks have no place to go",
            why="the snapshot is not written to a file",
            remedy="name a directory with --disks-dir, or leave the disks out with --disks none",
        )
    return directory


def _file_system(path: Path) -> str:
    """Return the file system's type, in the kernel's words; empty if unknown (proc(5):
    mountinfo)."""
    try:
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return ""


def _sink_error(what: str, error: OSError) -> SinkError:
    return SinkError(what, why=error.strerror, guest_state="running")
