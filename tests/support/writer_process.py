"""The process of ``tests/native/writer.c``, captures of it, and whether one is torn."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from stillframe.capture.ram_capture import RamCapture
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.model import Backing, RamBlock, StoppedWrite
from tests.support.native_build import build

IDLE = -1
FULL_SPEED = 0
SECTION_ID = 2
_IDSTR = "pc.ram"
_BACKING: dict[str, Backing] = {
    "private": "anonymous",
    "thp": "anonymous",
    "shared": "memfd",
    "zero": "shmem",
    "hugetlb": "hugetlbfs",
    "hugetlb-private": "hugetlbfs",
    "hugetlb-private-memfd": "hugetlbfs",
}


@dataclass(frozen=True)
class WriterStatus:
    passes: int
    longest_gap_us: int
    written_pages: int
    result: int


class WriterProcess:
    """A running writer; ended with the context."""

    def __init__(self, kind: str, mib: int, pages_per_s: int) -> None:
        self._process = subprocess.Popen(
            [str(build("tests/native/writer.c")), kind, str(mib), str(pages_per_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        hva, length, fd, page = map(int, self._process.stdout.readline().split())
        self.block = RamBlock(
            idstr=_IDSTR,
            hva=hva,
            used_length_bytes=length,
            max_length_bytes=length,
            page_size_bytes=page,
            backing=_BACKING[kind],
            shared=kind in ("shared", "zero", "hugetlb"),
            backing_fd=fd if fd >= 0 else None,
        )
        written = length - length // 4
        self.written_bytes = written - written % page

    def command(self, line: str = "s") -> WriterStatus:
        """Send one command; TimeoutError if the process does not answer in a minute."""
        self.send(line)
        return self.answer(60)

    def send(self, line: str) -> None:
        """Send one command without waiting: it may fault."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answers(self, within_s: float) -> bool:
        """Whether an answer comes in that time (it is not read)."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], within_s)[0])

    def answers_with_gil_held(self, within_s: float) -> bool:
        """As ``answers``, while no other thread of ours runs Python code."""
        assert self._process.stdout is not None
        poll = ctypes.PyDLL(None).poll  # its calls keep the GIL
        wanted = (ctypes.c_int * 2)(self._process.stdout.fileno(), select.POLLIN)
        return bool(poll(wanted, ctypes.c_ulong(1), ctypes.c_int(int(within_s * 1000))) == 1)

    def answer(self, within_s: float) -> WriterStatus:
        assert self._process.stdout is not None
        if not self.answers(within_s):
            raise TimeoutError("the writer did not answer")
        return WriterStatus(*map(int, self._process.stdout.readline().split()))

    def drop(self, how: str, offset_bytes: int, length_bytes: int) -> None:
        result = self.command(f"{how} {offset_bytes} {length_bytes}").result
        assert result == 0, os.strerror(result)

    def exit_now(self) -> None:
        self.send("z")
        self._process.wait(timeout=60)

    def runs(self) -> bool:
        """Whether it writes: its counter moves within a minute."""
        before, deadline_s = self.command().written_pages, time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if self.command().written_pages > before:
                return True
            threading.Event().wait(0.02)
        return False

    def __enter__(self) -> WriterProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait(timeout=60)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class Captured:
    """What a capture gave: pages by offset (None: a zero page), each seen exactly once."""

    pages: dict[int, bytes | None] = field(default_factory=dict)
    repeated: list[int] = field(default_factory=list)
    writes: tuple[StoppedWrite, ...] = ()
    statistics: dict[str, object] = field(default_factory=dict)

    def words(self, written_bytes: int, page_bytes: int) -> list[int]:
        """First and last word of each page, in the order in which they are written."""
        found = []
        for offset in range(0, written_bytes, page_bytes):
            for target, at in ((offset, 0), (offset + page_bytes - 4096, 4088)):
                page = self.pages[target]
                found.append(0 if page is None else struct.unpack_from("<Q", page, at)[0])
        return found

    def is_torn(self, written_bytes: int, page_bytes: int) -> bool:
        """Whether it shows no single instant of the writer."""
        words = self.words(written_bytes, page_bytes)
        edges = sum(left != right for left, right in itertools.pairwise(words))
        return edges > 1 or max(words) - min(words) > 1 or words[0] < words[-1]


def add_section(raw: bytes, into: Mapping[str, Captured]) -> None:
    """Put the records of one ``ram`` section to what was captured of their blocks."""
    at, name = 5, ""
    while True:
        (word,) = struct.unpack_from(">Q", raw, at)
        at += 8
        offset, flags = word & ~0xFFF, word & 0xFFF
        if flags & 0x10:
            assert raw[at] == 0x7E
            assert len(raw) == at + 5
            return
        if not flags & 0x20:
            name = raw[at + 1 : at + 1 + raw[at]].decode()
            at += 1 + raw[at]
        captured = into[name]
        if offset in captured.pages:
            captured.repeated.append(offset)
        if flags & 0x08:
            captured.pages[offset] = raw[at : at + 4096]
            at += 4096
        else:
            captured.pages[offset] = None
            at += 1


@contextlib.contextmanager
def armed(
    writer: WriterProcess,
    *,
    spill_bytes: int = 64 << 20,
    kind: Callable[..., RamCapture] = RamCapture,
    arm: bool = True,
) -> Iterator[RamCapture]:
    """A capture of the writer, up to the moment before the stop."""
    uffd: Userfaultfd = attach(writer.pid)
    capture = kind(uffd, writer.pid, [writer.block], spill_bytes=spill_bytes)
    try:
        capture.register()
        capture.start()
        if arm:
            capture.arm()
        yield capture
    finally:
        capture.release()
        capture.close()


def stop_and_fix(writer: WriterProcess, capture: RamCapture) -> tuple[StoppedWrite, ...]:
    """The downtime: pause, protect what was written, fix the instant, continue."""
    writer.command("p")
    capture.protect_written()
    writes = capture.instant()
    writer.command("c")
    return writes


def drain(capture: RamCapture, into: Captured | Mapping[str, Captured], workers: int = 2) -> None:
    """Run workers until they find nothing more. ``into``: by block, if there are several."""
    batches: list[bytes] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            worker = capture.worker(SECTION_ID)
            while worker.next():
                batches.append(bytes(worker.raw))
                assert len(worker.runs) % 24 == 0
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    by_block = {_IDSTR: into} if isinstance(into, Captured) else into
    for batch in batches:
        add_section(batch, by_block)


def take(
    writer: WriterProcess,
    *,
    workers: int = 2,
    spill_bytes: int = 64 << 20,
    kind: Callable[..., RamCapture] = RamCapture,
    arm: bool = True,
) -> Captured:
    """One whole capture of the writer."""
    captured = Captured()
    with armed(writer, spill_bytes=spill_bytes, kind=kind, arm=arm) as capture:
        captured.writes = stop_and_fix(writer, capture)
        drain(capture, captured, workers)
        capture.finish()
        drain(capture, captured, 1)
        captured.statistics = capture.statistics()
        capture.check()
    return captured
