"""A stopped or running QEMU for stream tests, driven by plain QMP: no code under test in it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from guests.qemu import qemu_binary
from tests.support.waiting import wait_until

TIMEOUT_S = 60
_SILENT_S = 10.0

WRITER_BOOT_SECTOR = (
    bytes.fromhex(
        # cli; forever: for (ax = 0x1000; ax < 0x9000; ax += 0x100) { ds = ax; ++ds:[0]; }
        "fa b80010 8ed8 fe060000 050001 3d0090 72f2 ebed"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
"""Boots on any x86 and changes one byte in each page from 64 KiB to 576 KiB, forever."""


def into_file(path: Path) -> str:
    """The URI of a migration into a file, which has its name only once all is in it: QEMU calls a
    migration completed while ``cat`` may still have some of it to write."""
    return f"exec:cat>{path}.part && mv {path}.part {path}"


class QmpError(Exception):
    """The monitor answered with an error."""


class StreamVm:
    """One QEMU process with a QMP connection; ``stderr`` is complete after :meth:`quit`."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        self.directory = directory
        self._path = Path(tempfile.mkdtemp(dir=directory)) / "qmp"
        self._stderr = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by quit
        self.process = subprocess.Popen(
            [qemu_binary(), "-display", "none", "-accel", "tcg", "-serial", "null",
             "-monitor", "none", "-qmp", f"unix:{self._path},server=on,wait=off", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )  # fmt: skip
        try:
            self._socket = self._connect()
            self._file = self._socket.makefile("rwb")
            self._file.readline()
            self.qmp("qmp_capabilities")
        except OSError as error:
            self.process.kill()
            self.process.wait()
            raise QmpError(f"QEMU did not start: {self._said()}") from error

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._path))
            except OSError:
                connection.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                connection.settimeout(TIMEOUT_S)
                return connection

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def hmp(self, line: str) -> str:
        return str(self.qmp("human-monitor-command", **{"command-line": line}))

    def status(self) -> str:
        return str(self.qmp("query-status")["status"])

    def capability(self, *names: str) -> None:
        self.qmp(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in names],
        )

    def device_state(self) -> bytes:
        """What xen-save-devices-state writes; the VM must be stopped."""
        path = self.directory / "devices.bin"
        self.qmp("xen-save-devices-state", filename=str(path), live=False)
        return path.read_bytes()

    def migrate(self) -> bytes:
        """The stream of a migration to a file."""
        path = self.directory / "stream.bin"
        path.unlink(missing_ok=True)
        self.qmp("migrate", uri=into_file(path))
        self.wait_migrated()
        wait_until(path.exists)
        return path.read_bytes()

    def migrate_to_socket(self, count: int) -> list[bytes]:
        """What a migration sends on each of its ``count`` channels to one that only listens.

        The status is not waited for: with a return path QEMU waits for the other side.
        """
        path = self.directory / "incoming"
        channels: list[bytearray] = []
        threads: list[Thread] = []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(TIMEOUT_S)
            self.qmp("migrate", uri=f"unix:{path}")
            for _ in range(count):
                channel, _ = listener.accept()
                channels.append(bytearray())
                threads.append(Thread(target=_drain, args=(channel, channels[-1])))
                threads[-1].start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        return [bytes(c) for c in channels]

    def wait_migrated(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while (status := self.qmp("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise QmpError(f"migration {status}")
            time.sleep(0.02)

    def memory(self, size_bytes: int) -> bytes:
        """Guest-physical memory from address 0."""
        path = self.directory / "memory.bin"
        self.qmp("pmemsave", val=0, size=size_bytes, filename=str(path))
        return path.read_bytes()

    def wait_status(self, *wanted: str) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while (status := self.status()) not in wanted:
            if time.monotonic() > deadline:
                raise QmpError(f"still {status}")
            time.sleep(0.02)
        return status

    def quit(self) -> str:
        """End the process; everything that it wrote to stderr."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError, QmpError, ValueError):
                self.qmp("quit")
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._file.close()
        self._socket.close()
        return self._said()

    def _said(self) -> str:
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        with self._stderr:
            return self._stderr.read().decode(errors="replace")


def _drain(channel: socket.socket, into: bytearray) -> None:
    """Read until the other side is silent: it may keep the connection open."""
    channel.settimeout(_SILENT_S)
    with channel, contextlib.suppress(TimeoutError, ConnectionError):
        while part := channel.recv(1 << 20):
            into += part


@contextlib.contextmanager
def stream_vm(arguments: Sequence[str], directory: Path) -> Iterator[StreamVm]:
    vm = StreamVm(arguments, directory)
    try:
        yield vm
    finally:
        vm.quit()


def write_boot_sector(directory: Path) -> list[str]:
    """Arguments for a VM that boots :data:`WRITER_BOOT_SECTOR`."""
    path = directory / "boot.img"
    path.write_bytes(WRITER_BOOT_SECTOR + bytes(1 << 20))
    return ["-drive", f"file={path},format=raw,snapshot=on"]
