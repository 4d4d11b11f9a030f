"""A writer process whose RAM stays armed: snapshots of it, each but the first an increment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from stillframe.capture.ram_capture import RamCapture
from stillframe.kernel.remote_attach import attach
from tests.support.writer_process import Captured, WriterProcess, drain

PAGE = 4096


def ram_of(writer: WriterProcess) -> bytes:
    """All of its RAM, as it is now."""
    with open(f"/proc/{writer.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(writer.block.hva)
        found = bytearray()
        while len(found) < writer.block.used_length_bytes:
            part = memory.read(writer.block.used_length_bytes - len(found))
            assert part
            found += part
    return bytes(found)


class WatchedWriter:
    """The capture of one, and what its snapshots, laid one upon the other, say of RAM."""

    def __init__(self, writer: WriterProcess, capture: RamCapture) -> None:
        self.writer = writer
        self.capture = capture
        self.chain: dict[int, bytes] = {}
        self._first = True

    def fix(self) -> bytes:
        """The downtime; what RAM was then."""
        if self._first:
            self.capture.arm()
            self._first = False
        else:
            self.capture.settle()
        self.writer.command("p")
        self.capture.protect_written()
        truth = ram_of(self.writer)
        self.capture.instant()
        self.writer.command("c")
        return truth

    def save(self) -> Captured:
        """What the instant's job captures; RAM is armed again afterwards."""
        captured = Captured()
        drain(self.capture, captured)
        self.capture.rearm()
        drain(self.capture, captured, 1)
        self.capture.check()
        assert not captured.repeated
        captured.statistics = self.capture.statistics()
        assert captured.statistics["pages_done"] == captured.statistics["pages_wanted"]
        self.chain.update({at: page or bytes(PAGE) for at, page in captured.pages.items()})
        return captured

    def snapshot(self) -> tuple[Captured, list[int]]:
        """One; and the offsets of pages at which the chain is not RAM as it was."""
        truth = self.fix()
        captured = self.save()
        return captured, self.wrong(truth)

    def wrong(self, truth: bytes) -> list[int]:
        return [at for at in range(0, len(truth), PAGE) if self.chain[at] != truth[at : at + PAGE]]


@contextlib.contextmanager
def watched(
    writer: WriterProcess,
    *,
    spill_bytes: int = 64 << 20,
    kind: Callable[..., RamCapture] = RamCapture,
) -> Iterator[WatchedWriter]:
    capture = kind(attach(writer.pid), writer.pid, [writer.block], spill_bytes=spill_bytes)
    try:
        capture.stay_armed()
        capture.register()
        capture.start()
        yield WatchedWriter(writer, capture)
    finally:
        capture.release()
        capture.close()
    assert os.path.exists(f"/proc/{writer.pid}")
