"""The Linux guest's initramfs: one static program, directories, and optional modules and agent."""

from __future__ import annotations

import gzip
import stat
from pathlib import Path
from typing import NamedTuple

from guests.agent_files import agent_files
from guests.build import FREESTANDING, SOURCES, built, common_headers, run_tool
from guests.kernel import kernel_modules

TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file of a cpio archive; ``mode`` holds its type as ``st_mode`` does."""

    name: str
    mode: int
    content: bytes = b""


def newc_archive(entries: list[Entry]) -> bytes:
    """Make a cpio archive in the "newc" format, which the kernel unpacks as an initramfs.

    All files belong to root and have no timestamp, so equal input gives equal bytes.
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


DISK_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")
AGENT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4")


def linux_initramfs(*, disks: bool = False, agent: bool = False) -> Path:
    """Return the Linux guest's gzipped initramfs; build it if its sources have changed.

    Args:
        disks: include the kernel's modules for virtio disks.
        agent: include a QEMU guest agent, and the modules for its port and an ext4 disk.

    Raises:
        HostError: gcc is missing or fails, the cache cannot be written, or no agent is available.
    """
    main = SOURCES / "linux" / "init.c"
    headers = [*common_headers(), main.with_name("journal.h"), main.with_name("agent.h")]
    names = (DISK_MODULES if disks else ()) + (AGENT_MODULES if agent else ())
    modules = kernel_modules(names) if names else []
    files = agent_files() if agent else {}

    def make(scratch: Path, output: Path) -> None:
        init = scratch / "init"
        command = ["gcc", *FREESTANDING, "-o", str(init), str(main)]
        run_tool(command, "build the Linux guest's init", package="gcc")
        entries = [
            Entry("proc", stat.S_IFDIR | 0o755),
            Entry("dev", stat.S_IFDIR | 0o755),
            Entry("modules", stat.S_IFDIR | 0o755),
            *(
                Entry(f"modules/{number:02}", stat.S_IFREG | 0o644, module.read_bytes())
                for number, module in enumerate(modules)
            ),
            *_tree(files),
            Entry("init", stat.S_IFREG | 0o755, init.read_bytes()),
        ]
        output.write_bytes(gzip.compress(newc_archive(entries), mtime=0))

    return built(
        "initramfs.cpio.gz", [main, *headers, *modules, *files.values(), Path(__file__)], make
    )


def _tree(files: dict[str, Path]) -> list[Entry]:
    """Return the entries of the agent's files, of their directories, and of its mount points."""
    if not files:
        return []
    directories = {parent for name in files for parent in Path(name).parents if parent.name}
    return [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in ("sys", "run", "data")),
        *(Entry(str(path), stat.S_IFDIR | 0o755) for path in sorted(directories)),
        *(
            Entry(name, stat.S_IFREG | 0o755, path.read_bytes())
            for name, path in sorted(files.items())
        ),
    ]
