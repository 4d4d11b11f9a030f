"""A Linux guest that fills memory and gives it back, with a balloon or virtio-mem."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guests.initramfs import Entry, newc_archive
from guests.kernel import find_kernel, kernel_modules
from guests.qemu import qemu_binary
from stillframe.qmp.client import QmpClient
from stillframe.store import open_snapshot
from tests.support.native_build import build

_MODULES = ("virtio_pci", "virtio_balloon", "virtio_mem")
_BOOT_S = 120.0
_PAGE = struct.Struct("<Q")


def initramfs(path: Path) -> Path:
    """Write the guest's initramfs."""
    entries = [Entry("m", stat.S_IFDIR | 0o755)]
    program = build("tests/native/memory_guest.c", "-static", "-pthread")
    entries.append(Entry("init", stat.S_IFREG | 0o755, program.read_bytes()))
    for n, module in enumerate(kernel_modules(_MODULES)):
        name = f"m/{n:02}-{module.name}"
        entries.append(Entry(name, stat.S_IFREG | 0o644, module.read_bytes()))
    path.write_bytes(gzip.compress(newc_archive(entries), 1))
    return path


class MemoryGuest:
    """One QEMU with that guest; ``qmp`` is free, ``control`` is a second monitor's path."""

    def __init__(self, *arguments: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="memory-guest-")
        self.directory = Path(self._directory.name)
        self.qmp, self.control = str(self.directory / "qmp"), str(self.directory / "control")
        self._serial, self._log = self.directory / "serial", self.directory / "log"
        command = [qemu_binary(), "-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "max"]
        command += [
            "-kernel",
            str(find_kernel()),
            "-append",
            "console=ttyS0 quiet init_on_alloc=0 init_on_free=0",
        ]
        command += ["-initrd", str(initramfs(self.directory / "initrd"))]
        command += ["-chardev", f"socket,id=s0,path={self._serial},server=on,wait=off"]
        command[-1] += f",logfile={self._log}"
        command += ["-serial", "chardev:s0"]
        for path in (self.qmp, self.control):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.process = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL)
        try:
            self._until("READY", _BOOT_S)
        except BaseException:
            self.close()
            raise

    @property
    def qmp_path(self) -> Path:
        return Path(self.qmp)

    def is_progressing(self, within_s: float = 60.0) -> bool:
        """Whether it is seen to print within that time."""
        before, deadline = len(self._text()), time.monotonic() + within_s
        while len(self._text()) <= before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _until(self, text: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while text not in self._text():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"no {text} from the guest: {self._text()[-300:]}")
            time.sleep(0.05)

    def tell(self, line: str, within_s: float = 60.0) -> None:
        """Have the guest do something, and wait until it is done."""
        with socket.socket(socket.AF_UNIX) as serial:
            serial.connect(str(self._serial))
            serial.sendall(f"{line}\n".encode())
            self._until(f"DONE {line}", within_s)

    def execute(self, command: str, **arguments: Any) -> Any:
        with QmpClient.connect(self.control, timeout_s=60) as client:
            return client.execute(command, arguments)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    def __enter__(self) -> MemoryGuest:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def filled_pages(file: Path) -> set[int]:
    """Numbers of the pages that "pop" filled and that are whole in a snapshot."""
    found = set()
    with open_snapshot(file) as snapshot:
        every = (pages for block in snapshot.blocks for pages in snapshot.iter_pages(block.idstr))
        for _, page in every:
            if page is None:
                continue
            number = int.from_bytes(page[:8], "little") - 77
            if (
                0 <= number < 1 << 24
                and page[800:808] == _PAGE.pack(number * (2654435761) % (1 << 64) + 1)
                and page[4088:] == _PAGE.pack(~number & (1 << 64) - 1)
            ):
                found.add(number)
    return found


@contextlib.contextmanager
def huge_pages_mounted() -> Iterator[str]:
    """A directory on hugetlbfs."""
    with tempfile.TemporaryDirectory(prefix="hugetlbfs-") as directory:
        subprocess.run(["mount", "-t", "hugetlbfs", "none", directory], check=True)
        try:
            yield directory
        finally:
            os.sync()
            subprocess.run(["umount", directory], check=True)
