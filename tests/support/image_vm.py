"""VMs on images for tests: started from a snapshot of a test guest, and compared with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from guests.serial import SerialConsole
from stillframe.image.filling import Filling
from stillframe.image.ram_image import memory_file
from stillframe.image.small_stream import small_stream
from stillframe.image.start import Started, start_clones
from stillframe.machine.qemu.ramblocks import read_ram_blocks
from stillframe.qmp.client import QmpClient
from stillframe.restore.emulator import Emulator
from stillframe.restore.on_image import map_image, plan_image
from stillframe.restore.records import ImagePlan, RestorePlan
from stillframe.still.sealing import Unlock
from stillframe.store import open_snapshot

PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_waiting(pid: int, address: int, length_bytes: int) -> memoryview:
    """Memory of a process by process_vm_readv(2), which waits for missing pages as its own threads
    do (``/proc/PID/mem`` answers EIO)."""
    buffer = bytearray(length_bytes)
    whole = (ctypes.c_char * length_bytes).from_buffer(buffer)
    at = 0
    while at < length_bytes:
        local = _IoVec(ctypes.addressof(whole) + at, length_bytes - at)
        remote = _IoVec(address + at, length_bytes - at)
        got = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        at += got
    return memoryview(buffer)


def read_ram(pid: int, qmp_path: str) -> dict[str, memoryview]:
    """All of a VM's RAM, by block; waits for pages that are missing."""
    with QmpClient.connect(qmp_path) as qmp:
        blocks = read_ram_blocks(pid, qmp)
    return {b.idstr: read_waiting(pid, b.hva, b.used_length_bytes) for b in blocks}


def ram_differences(
    pid: int, qmp_path: Path, file: Path, blocks: Sequence[str] = ()
) -> list[tuple[str, int]]:
    """(block, page) of all pages of a paused VM that are not a snapshot's."""
    return differences(read_ram(pid, str(qmp_path)), file, blocks)


def differences(
    ram: Mapping[str, memoryview],
    file: Path,
    only: Sequence[str] = (),
    unlock: Unlock | None = None,
) -> list[tuple[str, int]]:
    """(block, page) of all pages that are not the snapshot's."""
    found: list[tuple[str, int]] = []
    with open_snapshot(file, unlock) as snapshot:
        for block in snapshot.blocks:
            if only and block.idstr not in only:
                continue
            there = ram[block.idstr]
            for page, content in snapshot.iter_pages(block.idstr):
                if there[page * PAGE : (page + 1) * PAGE] != (content or bytes(PAGE)):
                    found.append((block.idstr, page))
    return found


class _Command:
    """What an emulator needs of a plan."""

    vmm_name, cwd, run_as = "QEMU", "/", None

    def __init__(self, argv: tuple[str, ...], qmp_address: str, log_path: Path) -> None:
        self.argv, self.program = argv, argv[0]
        self.qmp_address, self.log_path = qmp_address, log_path
        self.environment: dict[str, str] = {}
        self.machine_type = self.recorded_program = ""

    def argv_with_stream(self, fd: int) -> list[str]:
        return [*self.argv, "-incoming", f"fd:{fd}"]


class ImageVms:
    """One image and its VMs, in a directory; the VMs are killed at the end."""

    def __init__(
        self,
        file: Path,
        directory: Path,
        program: str | None = None,
        unlock: Unlock | None = None,
    ) -> None:
        self.file = file
        self.unlock = unlock
        self.directory = directory
        self.record_path = directory / "image.json"
        self.program = program
        self.started: list[Started] = []

    def start(
        self,
        count: int = 1,
        *,
        paused: bool = False,
        working_set: bool = True,
        make_file: Callable[[int], int] = memory_file,
    ) -> Filling:
        """Start clones with the snapshot's own command line; the image is being filled then."""
        plan = self._plan(share=count == 1)
        filling = Filling.make(
            self.file,
            plan.blocks,
            self.record_path,
            working_set=working_set,
            unlock=self.unlock,
            make_file=make_file,
        )
        try:
            self._run(filling, plan, count, paused=paused)
        except BaseException:
            filling.close()
            raise
        return filling

    def _plan(self, *, share: bool) -> ImagePlan:
        with open_snapshot(self.file, self.unlock) as snapshot:
            record, blocks = snapshot.manifest.machine, snapshot.blocks
        assert record is not None
        self._record = record
        plan = plan_image(record.argv[1:], blocks, share=share)
        assert not plan.streamed, plan.streamed
        return plan

    def _run(self, image: Filling, plan: ImagePlan, count: int, *, paused: bool) -> None:
        files = dict(zip(plan.blocks, image.image.fds, strict=True))
        words = map_image(self._record.argv[1:], plan, files)
        self._vmms = []
        for number in range(count):
            start = (
                self.program or self._record.executable,
                *(self._private(word, number) for word in words),
                *["-S"] * paused,
            )
            command = _Command(start, str(self.qmp_path(number)), self.directory / f"{number}.log")
            self._vmms.append(Emulator(cast(RestorePlan, command), inherits=image.inherited))
        stream = b"".join(small_stream(image.snapshot, plan.blocks))
        self.started = start_clones(image, self._vmms, stream)

    def _private(self, word: str, number: int) -> str:
        parts = word.split(",")
        for place, part in enumerate(parts):
            for key in ("unix:", "path="):
                if part.startswith(key):
                    name = part.rpartition("/")[2]
                    parts[place] = f"{key}{self.directory}/{number}-{name}"
        return ",".join(parts)

    def qmp_path(self, number: int = 0) -> Path:
        return self.directory / f"{number}-qmp.sock"

    def console(self, number: int = 0) -> SerialConsole:
        return SerialConsole(self.directory / f"{number}-serial.sock")

    def differences(self, number: int = 0, blocks: Sequence[str] = ()) -> list[tuple[str, int]]:
        """(block, page) of all pages of a paused clone that are not the snapshot's."""
        ram = read_ram(self.started[number].pid, str(self.qmp_path(number)))
        return differences(ram, self.file, blocks, self.unlock)

    def stop(self) -> None:
        ended, self.started = self.started, []
        for vm in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(vm.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(vm.pid, 0)


@contextlib.contextmanager
def image_vms(
    file: Path, directory: Path, program: str | None = None, unlock: Unlock | None = None
) -> Iterator[ImageVms]:
    """For ``with``."""
    directory.mkdir(exist_ok=True)
    vms = ImageVms(file, directory, program, unlock)
    try:
        yield vms
    finally:
        vms.stop()
