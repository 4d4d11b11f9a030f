"""Image files: made and measured with ``qemu-img`` (QEMU ``docs/tools``), and told apart."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from stillframe.errors import HostError, StillframeError
from stillframe.model import FrozenFile

HEAD_BYTES = 1 << 20
_STEP_BYTES = 8 << 20
_TIMEOUT_S = 120.0


class _Measured(msgspec.Struct, rename="kebab"):
    required: int
    fully_allocated: int


def qemu_img(words: Sequence[str], failure: str, *, pass_fds: Sequence[int] = ()) -> bytes:
    """Run ``qemu-img`` and return its output.

    Raises:
        HostError: it is missing, failed, or took too long; ``failure`` begins the message.
    """
    program = shutil.which("qemu-img")
    if program is None:
        raise HostError(
            failure,
            why="there is no qemu-img",
            remedy="install it (on Debian and Ubuntu: apt-get install qemu-utils)",
            guest_state="running",
        )
    try:
        done = subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            pass_fds=tuple(pass_fds),
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise HostError(failure, why=str(error), guest_state="running") from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise HostError(failure, why=words[-1] if words else None, guest_state="running")
    return done.stdout


def measured_bytes(path: str | None, image_format: str, virtual_size_bytes: int) -> int:
    """Return the most that a full copy as qcow2 needs; the size of a full disk if that is
    unknown."""
    size = ["measure", "-O", "qcow2", "--output=json"]
    failure = "cannot measure a disk"
    if path is not None:
        try:
            words = [*size, "-U", "-f", image_format, path]
            return msgspec.json.decode(qemu_img(words, failure), type=_Measured).required
        except (StillframeError, msgspec.MsgspecError):
            pass  # encrypted, or not readable for us
    words = [*size, "--size", str(virtual_size_bytes)]
    return msgspec.json.decode(qemu_img(words, failure), type=_Measured).fully_allocated


def local_size_bytes(path: str | int) -> int:
    """Return the length of a file or block device.

    Raises:
        OSError: it cannot be opened.
    """
    fd = (
        os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if isinstance(path, str) else path
    )
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        if isinstance(path, str):
            os.close(fd)


def sync_twice(paths: Sequence[str]) -> None:
    """Write back the host's page cache, so that the flush in the stop finds little.

    A failure only makes the downtime longer, so none is reported.
    """
    for path in (*paths, *paths):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            os.fdatasync(fd)
        except OSError:
            continue
        finally:
            os.close(fd)


def frozen_file(
    path: str,
    image_format: str,
    *,
    shown_as: str | None = None,
    digest: bool = False,
    step: Callable[[], object] | None = None,
) -> FrozenFile:
    """Return the record that tells this image from another, or from itself after a write.

    Args:
        shown_as: its path in the record. digest: read it all.
        step: called between two reads; may raise to give up.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        head = blake3(os.pread(fd, HEAD_BYTES, 0)).hexdigest()
        whole = ""
        if digest:
            hasher, at = blake3(), 0
            while part := os.pread(fd, _STEP_BYTES, at):
                hasher.update(part)
                at += len(part)
                if step is not None:
                    step()
            whole = hasher.hexdigest()
        return FrozenFile(
            path=shown_as or path,
            format=image_format,
            size_bytes=local_size_bytes(fd),
            mtime_ns=0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns,
            head=head,
            digest=whole,
        )
    finally:
        os.close(fd)


def shown_path(path: str, snapshot_directory: str | None) -> str:
    """Return the path for the manifest: relative if the file is beside the snapshot, so that both
    can be moved."""
    if snapshot_directory is not None and Path(path).is_relative_to(snapshot_directory):
        return str(Path(path).relative_to(snapshot_directory))
    return path
