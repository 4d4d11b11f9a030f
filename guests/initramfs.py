"""The initramfs of the Linux guest: one static program and three empty things beside it."""

from __future__ import annotations

import gzip
import stat
from pathlib import Path
from typing import NamedTuple

from guests.build import FREESTANDING, SOURCES, built, common_headers, run_tool

TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file of a cpio archive; ``mode`` holds its type as ``st_mode`` does."""

    name: str
    mode: int
    content: bytes = b""


def newc_archive(entries: list[Entry]) -> bytes:
    """A cpio archive in the "newc" format, which the kernel unpacks as an initramfs.

    Everything belongs to root and has no time stamp, so equal input gives equal bytes.
    Source: Linux ``Documentation/driver-api/early-userspace/buffer-format.rst``.
    """
    archive = bytearray()
    for inode, entry in enumerate([*entries, Entry(TRAILER, 0)], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def linux_initramfs() -> Path:
    """The gzipped initramfs of the Linux guest, compiled when its sources have changed.

    Raises:
        HostError: gcc is missing or fails, or the cache cannot be written.
    """
    main = SOURCES / "linux" / "init.c"
    headers = common_headers()

    def make(scratch: Path, output: Path) -> None:
        init = scratch / "init"
        command = ["gcc", *FREESTANDING, "-o", str(init), str(main)]
        run_tool(command, "build the Linux guest's init", package="gcc")
        entries = [
            Entry("proc", stat.S_IFDIR | 0o755),
            Entry("init", stat.S_IFREG | 0o755, init.read_bytes()),
        ]
        output.write_bytes(gzip.compress(newc_archive(entries), mtime=0))

    return built("initramfs.cpio.gz", [main, *headers, Path(__file__)], make)
