"""How long until a VM is back: QEMU's own ways, the stream, and images; all in one run.

Run as ``python -m bench.restore``. Every time is from the command to the guest's first instruction
(QEMU's run state ``running``), to the first line on its serial line, and until all of RAM is there.
It records: its exit code does not depend on any figure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from bench.sizes import show, sizes_parser
from bench.table import grid
from guests.qemu import GuestVm, qemu_binary
from guests.serial import SerialConsole
from stillframe import api
from stillframe.errors import MachineError, NotFoundError
from stillframe.image.stored import ENVIRONMENT
from stillframe.image.working_set import working_set_path
from stillframe.machine.finding import connect
from stillframe.qmp.client import QmpClient
from stillframe.restore.plan import plan_restore
from stillframe.restore.records import RestorePlan
from stillframe.restore.restored import RestoredVm
from stillframe.restore.start import restore
from stillframe.snapshot.job import SnapshotJob
from stillframe.snapshot.options import SnapshotOptions
from stillframe.snapshot.take import take_snapshot
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink

_TIMEOUT_S = 300.0
_POLL_S = 0.002
_FIRST_S = 1.0
BARE = "bare start"


class Back(msgspec.Struct, frozen=True, kw_only=True):
    """One restore, in milliseconds from the command on. ``gap_ms``: the guest's longest gap in its
    first second, as it saw itself. None: no figure."""

    running_ms: float
    output_ms: float | None = None
    resident_ms: float | None = None
    gap_ms: float | None = None


class Bench:
    """One snapshot, and the ways to restore it."""

    def __init__(self, file: Path, stream: Path, program: str) -> None:
        self.file = file
        self.stream = stream
        self.program = program

    @contextlib.contextmanager
    def plan(self) -> Iterator[RestorePlan]:
        """Plan a restore in its own directory; on exit, kill its VM and remove the directory."""
        root = Path(tempfile.mkdtemp(prefix="bench-restore-"))
        try:
            with open_snapshot(self.file) as snapshot:
                plan = plan_restore(snapshot, directory=root / "vm", program=self.program)
            yield plan
        finally:
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if str(root).encode() in entry.read_bytes():
                        os.kill(int(entry.parent.name), signal.SIGKILL)
            shutil.rmtree(root, ignore_errors=True)

    def qemu(self, *more: str) -> Back:
        """Start QEMU alone, with ``more`` arguments: an incoming stream, or none."""
        with self.plan() as plan:
            Path(plan.directory).mkdir(parents=True)
            began_s = time.monotonic()
            process = subprocess.Popen(
                [*plan.argv, *more], cwd=plan.cwd, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                running_s = wait_running(plan.qmp_address)
                return self._seen(plan, began_s, running_s, first_output=bool(more))
            finally:
                process.kill()
                process.wait()

    def by_stream(self) -> Back:
        """Restore with Stillframe, all of RAM through QEMU's incoming stream."""
        with self.plan() as plan:
            began_s = time.monotonic()
            vm = restore(
                self.file, directory=Path(plan.directory), program=self.program, stream=True
            )
            running_s = time.monotonic()
            back = self._seen(plan, began_s, running_s)
            os.kill(vm.pid, signal.SIGKILL)
            return msgspec.structs.replace(back, resident_ms=back.running_ms)

    def by_image(self, *, working_set: bool) -> Back:
        """Restore with Stillframe, RAM on an image that is filled."""
        with self.plan() as plan:
            if not working_set:
                working_set_path(self.file).unlink(missing_ok=True)
            began_s = time.monotonic()
            vm = restore(self.file, directory=Path(plan.directory), program=self.program, fill=True)
            try:
                assert vm.image_path, vm.notes
                assert vm.first_instruction_ms
                with ThreadPoolExecutor(1) as pool:  # wait in parallel with _seen's first second
                    resident = pool.submit(_resident_ms, vm, began_s)
                    back = self._seen(plan, began_s, began_s + vm.first_instruction_ms / 1000)
                    return msgspec.structs.replace(back, resident_ms=resident.result())
            finally:
                vm.kill()

    def by_complete_image(self, image: Path) -> Back:
        """Restore with Stillframe, RAM on the cached complete image."""
        with self.plan() as plan, _cache_at(image):
            began_s = time.monotonic()
            vm = restore(self.file, directory=Path(plan.directory), program=self.program)
            try:
                assert vm.is_on_image
                assert vm.image_path is None
                assert vm.first_instruction_ms
                back = self._seen(plan, began_s, began_s + vm.first_instruction_ms / 1000)
                return msgspec.structs.replace(back, resident_ms=vm.resident_ms)
            finally:
                vm.kill()

    def _seen(
        self, plan: RestorePlan, began_s: float, running_s: float, *, first_output: bool = True
    ) -> Back:
        output_s: float | None = None
        gaps: list[int] = []
        if first_output:
            console = SerialConsole(Path(plan.directory) / "serial0.sock")
            try:
                while time.monotonic() < running_s + _FIRST_S or output_s is None:
                    tick = console.wait_tick(_TIMEOUT_S)
                    output_s = output_s or time.monotonic()
                    gaps.append(tick.gap_us)
            finally:
                console.close()
        return Back(
            running_ms=(running_s - began_s) * 1000,
            output_ms=(output_s - began_s) * 1000 if output_s else None,
            gap_ms=max(gaps) / 1000 if gaps else None,
        )

    def cool(self, *more: Path) -> None:
        """Evict the snapshot and other files from the page cache."""
        for file in (self.file, *more):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def warm(self) -> None:
        """Read the snapshot into the page cache."""
        with self.file.open("rb") as file:
            while file.read(1 << 20):
                pass


@contextlib.contextmanager
def _cache_at(directory: Path) -> Iterator[None]:
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = str(directory)
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def _resident_ms(vm: RestoredVm, began_s: float) -> float | None:
    done = vm.wait_resident(_TIMEOUT_S)
    return (time.monotonic() - began_s) * 1000 if done else None


def wait_running(address: str) -> float:
    """Wait until the VM's vCPUs run; return the moment (monotonic clock)."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    qmp: QmpClient | None = None
    try:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(NotFoundError, MachineError):
                qmp = qmp or QmpClient.connect(address, timeout_s=_TIMEOUT_S)
                status = qmp.execute("query-status", timeout_s=_TIMEOUT_S)
                if isinstance(status, dict) and status.get("status") == "running":
                    return time.monotonic()
            time.sleep(_POLL_S)
    finally:
        if qmp is not None:
            qmp.close()
    raise MachineError("QEMU does not run", guest_state="unknown")


def _methods(bench: Bench, cache: Path) -> dict[str, Callable[[], Back]]:
    def image(*, cold: bool, working_set: bool) -> Callable[[], Back]:
        def run() -> Back:
            if not working_set:
                working_set_path(bench.file).unlink(missing_ok=True)
            (bench.cool if cold else bench.warm)()
            return bench.by_image(working_set=working_set)

        return run

    def complete(*, cold: bool) -> Back:
        if cold:
            bench.cool(*cache.glob("*/*.ram"))
        return bench.by_complete_image(cache)

    def stream_cold() -> Back:
        bench.cool()
        return bench.by_stream()

    return {
        BARE: bench.qemu,
        "QEMU's own load": lambda: bench.qemu("-incoming", f"exec:cat {bench.stream}"),
        "stream, cold": stream_cold,
        "stream, warm": bench.by_stream,
        "image, cold": image(cold=True, working_set=False),
        "image, warm": image(cold=False, working_set=False),
        "image, cold, working set": image(cold=True, working_set=True),
        "image, warm, working set": image(cold=False, working_set=True),
        "complete image, cold": lambda: complete(cold=True),
        "complete image, warm": lambda: complete(cold=False),
    }


def _run(ram_mib: int, populate: int, repeat: int, program: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-restore-") as root:
        file, stream = Path(root) / "vm.still", Path(root) / "vm.stream"
        vm = GuestVm("linux", ram_mib=ram_mib, populate_mib=populate, binary=program)
        with vm.start(), connect(str(vm.qmp_path)) as machine:
            SnapshotJob(
                lambda c: take_snapshot(c, machine, LocalSink(file), SnapshotOptions())
            ).wait(_TIMEOUT_S)
        with open_snapshot(file) as snapshot, stream.open("wb") as out:
            for piece in snapshot.iter_stream():
                out.write(piece)
        bench, cache = Bench(file, stream, program), Path(root) / "images"
        with _cache_at(cache):
            api.add_image(file)
        results: dict[str, list[dict[str, Any]]] = {}
        # In turns, so that other load on the host affects all alike.
        for _ in range(repeat):
            for name, method in _methods(bench, cache).items():
                run = method()
                results.setdefault(name, []).append(msgspec.to_builtins(run))
                print(f"{ram_mib} MiB, {name}: {run.running_ms:.0f} ms", file=sys.stderr)
        medians = {name: _medians(runs) for name, runs in results.items()}
        base, own = medians[BARE]["running_ms"], medians["QEMU's own load"]["running_ms"]
        return {
            "ram_mib": ram_mib,
            "data_mib": populate,
            "file_mib": file.stat().st_size >> 20,
            "runs": results,
            "medians": medians,
            "ratios": {
                name: {
                    "running_minus_bare_ms": values["running_ms"] - base,
                    "own_load_over_running": own / values["running_ms"],
                }
                for name, values in medians.items()
            },
        }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for key in runs[0]:
        values = [run[key] for run in runs if run[key] is not None]
        found[key] = statistics.median(values) if values else None
    return found


def _table(result: dict[str, Any]) -> str:
    rows = [["", "runs, ms", "- bare", "own/x", "output", "resident", "gap 1 s"]]
    for name, values in result["medians"].items():
        ratio = result["ratios"][name]
        cells = (
            values["running_ms"],
            ratio["running_minus_bare_ms"],
            None,
            values["output_ms"],
            values["resident_ms"],
            values["gap_ms"],
        )
        row = ["-" if cell is None else f"{cell:.0f}" for cell in cells]
        row[2] = f"{ratio['own_load_over_running']:.1f}"
        rows.append([name, *row])
    head = f"{result['ram_mib']} MiB of RAM, {result['data_mib']} MiB of data (medians, ms)"
    return "\n".join([head, *grid(rows)])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code depends on no figure."""
    options = sizes_parser("restore", __doc__).parse_args(arguments)
    program = options.qemu or qemu_binary()
    results = [
        _run(ram_mib, (ram_mib - 128) * 3 // 4, options.repeat, program) for ram_mib in options.ram
    ]
    show(results, _table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
