"""What a fault costs the guest: our fault path beside a plain C loop, on the same process.

Run as ``python -m bench.fault_path [--rounds N] [--json FILE]``; needs the rights that attaching
needs. Both serve the same writes in turns, so that what else the host does falls on both; the
figure that counts is the ratio. Target: our median within 1.5 times plain C.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from stillframe.capture import _capture, new_core
from stillframe.capture.ram_capture import RamCapture
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.model import RamBlock

RAM_MIB = 48
MIB = 1 << 20
TARGET_RATIO = 1.5


@dataclass(frozen=True)
class Shape:
    """A pattern of ``count`` writes, one every ``stride_bytes``. Both sides copy ``window_bytes``
    per fault: ours copies so much after it has seen writes in address order, otherwise one page."""

    name: str
    window_bytes: int
    stride_bytes: int
    count: int


SHAPES = (
    Shape("4 KiB", 4096, 8192, 24 * MIB // 4096),
    Shape("64 KiB", 64 << 10, 4096, 24 * MIB // 4096),
)


@dataclass(frozen=True)
class Latency:
    """Latencies of one round's faulting writes, as the writer sees them."""

    p50_us: float
    p99_us: float
    faults: int


class Victim:
    """The process that faults."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [str(program), "victim", str(RAM_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.hva = int(self._line())

    def _line(self) -> str:
        if self._process.stdout is None:
            raise RuntimeError("the victim has no output")
        return self._process.stdout.readline()

    def write(self, shape: Shape) -> Latency:
        if self._process.stdin is None:
            raise RuntimeError("the victim has no input")
        self._process.stdin.write(f"{shape.stride_bytes} {shape.count}\n")
        self._process.stdin.flush()
        p50_ns, p99_ns, faults = map(int, self._line().split())
        return Latency(p50_ns / 1e3, p99_ns / 1e3, faults)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)


def _capture_of(victim: Victim, uffd: Userfaultfd) -> RamCapture:
    length = RAM_MIB * MIB
    block = RamBlock(
        idstr="ram",
        hva=victim.hva,
        used_length_bytes=length,
        max_length_bytes=length,
        page_size_bytes=4096,
    )
    return RamCapture(uffd, victim.pid, [block], spill_bytes=2 * length)


def measure_ours(victim: Victim, shape: Shape) -> Latency:
    """Run one round through the core's own fault thread."""
    before = new_core.MAX_WINDOW_BYTES
    new_core.MAX_WINDOW_BYTES = shape.window_bytes
    try:
        capture = _capture_of(victim, attach(victim.pid))
    finally:
        new_core.MAX_WINDOW_BYTES = before
    try:
        capture.register()
        capture.start()
        capture.arm()
        capture.instant()
        return victim.write(shape)
    finally:
        capture.release()
        capture.close()


def measure_plain(program: Path, victim: Victim, shape: Shape) -> Latency:
    """Run one round through the plain C loop."""
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
    with attach(victim.pid) as uffd:
        uffd.register(victim.hva, RAM_MIB * MIB)
        core = _capture.Capture(
            uffd.fileno(),
            stop_fd,
            victim.pid,
            [(victim.hva, RAM_MIB * MIB // 4096, RAM_MIB * MIB // 4096, 4096, -1, 0, 0, b"ram")],
            slab_bytes=MIB,
            spill_slabs=1,
            max_window_bytes=4096,
        )
        core.protect(0, 0, RAM_MIB * MIB // 4096)
        server = subprocess.Popen(
            [str(program), "serve"]
            + [str(n) for n in (uffd.fileno(), stop_fd, victim.pid, victim.hva)]
            + [str(RAM_MIB * MIB), str(shape.window_bytes)],
            stdout=subprocess.PIPE,
            pass_fds=(uffd.fileno(), stop_fd),
        )
        try:
            if server.stdout is None or server.stdout.readline() != b"serving\n":
                raise RuntimeError("the plain C loop did not start")
            return victim.write(shape)
        finally:
            os.eventfd_write(stop_fd, 1)
            server.communicate(timeout=10)
            os.close(stop_fd)


def run(rounds: int) -> list[dict[str, object]]:
    """Measure every shape; return a record for each, with medians over the rounds and ratios."""
    records: list[dict[str, object]] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = directory / "fault_loop"
        source = Path(__file__).with_name("fault_loop.c")
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
        victim = Victim(program)
        stack.callback(victim.close)
        methods: dict[str, Callable[[Shape], Latency]] = {
            "ours": lambda shape: measure_ours(victim, shape),
            "plain": lambda shape: measure_plain(program, victim, shape),
        }
        for shape in SHAPES:
            found: dict[str, list[Latency]] = {name: [] for name in methods}
            for turn in range(rounds):
                # Alternate the order, so that neither side always finds the caches warm.
                for name in sorted(methods, reverse=bool(turn % 2)):
                    found[name].append(methods[name](shape))
            pairs = list(zip(found["ours"], found["plain"], strict=True))
            records.append(
                {
                    "shape": asdict(shape),
                    "rounds": rounds,
                    **{
                        f"{name}_{figure}": statistics.median(
                            getattr(latency, figure) for latency in latencies
                        )
                        for name, latencies in found.items()
                        for figure in ("p50_us", "p99_us", "faults")
                    },
                    "p50_ratio": statistics.median(o.p50_us / p.p50_us for o, p in pairs),
                    "p99_ratio": statistics.median(o.p99_us / p.p99_us for o, p in pairs),
                    "target_ratio": TARGET_RATIO,
                }
            )
    return records


def table(records: list[dict[str, object]]) -> str:
    lines = [f"{'window':8} {'':6} {'p50 µs':>8} {'p99 µs':>8}"]
    for record in records:
        shape = record["shape"]
        name = shape["name"] if isinstance(shape, dict) else ""
        for who in ("plain", "ours"):
            lines.append(
                f"{name:8} {who:6} {record[f'{who}_p50_us']:8.1f} {record[f'{who}_p99_us']:8.1f}"
            )
        lines.append(
            f"{name:8} {'ratio':6} {record['p50_ratio']:8.2f} {record['p99_ratio']:8.2f}"
            f"   (target {TARGET_RATIO})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args()
    records = run(arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    sys.stdout.write(table(records) + "\n")


if __name__ == "__main__":
    main()
