"""Capture a process again and again, until killed: the victim of the kill -9 tests.

Run as ``python -m tests.support.capture_child PID BLOCK_AS_JSON``. Prints the name of each
stage as it enters it.
"""

from __future__ import annotations

import sys

import msgspec

from stillframe.capture.ram_capture import RamCapture
from stillframe.kernel.remote_attach import attach
from stillframe.model import RamBlock

STAGES = ("attach", "register", "arm", "instant", "sweep", "finish")


def _once(pid: int, block: RamBlock) -> None:
    def enter(stage: str) -> None:
        print(stage, flush=True)

    enter("attach")
    uffd = attach(pid)
    capture = RamCapture(uffd, pid, [block], spill_bytes=256 << 20)
    enter("register")
    capture.register()
    capture.start()
    enter("arm")
    capture.arm()
    enter("instant")
    capture.instant()
    enter("sweep")
    worker = capture.worker(2)
    while worker.next():
        pass
    enter("finish")
    capture.finish()
    capture.close()


def main() -> None:
    pid, block = int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=RamBlock)
    while True:
        _once(pid, block)


if __name__ == "__main__":
    main()
