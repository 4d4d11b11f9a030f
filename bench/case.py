"""One case: a VM of one kind, on which all methods take turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.cpu_wait import CpuWait
from bench.figures import Figures, Spread, figures, ratios, spreads
from bench.free_run import FreeRun, free_run
from bench.guest_view import guest_view
from bench.methods import Method, Subject
from bench.observer import Observer
from guests.qemu import Accelerator, Fill, GuestKind, GuestVm, MemoryKind
from stillframe.errors import StillframeError

_TICK_MS = 20


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """The guest to save. ``rate_mib_per_s`` 0 is full speed, over a working set of ``mem_mib``.

    ``rest_us``: how long the guest rests when it has nothing to write; 0: it never rests.
    """

    guest: GuestKind
    ram_mib: int
    populate_mib: int
    fill: Fill
    mem_mib: int
    rate_mib_per_s: int
    rest_us: int
    memory: MemoryKind
    accelerator: Accelerator
    qemu: str | None = None


class MethodResult(msgspec.Struct, kw_only=True):
    """All repetitions of one method in one case."""

    repetitions: list[Figures] = []
    failures: list[str] = []
    spreads: dict[str, Spread] = {}
    ratios: dict[str, float] = {}
    """Our methods' ratios to QEMU's own."""


class CaseResult(msgspec.Struct, kw_only=True):
    """A case and its results."""

    case: Case
    methods: dict[str, MethodResult]
    qemu_version: str = ""
    audits: list[str] = []
    failure: str | None = None


def run_case(
    case: Case,
    methods: Mapping[str, Method],
    *,
    repeat: int,
    directory: Path,
    free_s: float,
    peer: str,
    say: Callable[[str], None],
) -> CaseResult:
    """Start the VM, and run the methods in turns: A B C, A B C, ...

    A method that fails is recorded as failed, and the others continue.

    Args:
        directory: where all methods save to.
        free_s: how long the guest runs undisturbed between two saves.
        peer: the method that ours are compared with.
    """
    result = CaseResult(case=case, methods={name: MethodResult() for name in methods})
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-vm-") as sockets:
        observed = Path(sockets) / "observer.sock"
        vm = GuestVm(
            case.guest,
            ram_mib=case.ram_mib,
            mem_mib=case.mem_mib,
            populate_mib=case.populate_mib,
            rate_mib_per_s=case.rate_mib_per_s,
            fill=case.fill,
            append=f"sf.rest_us={case.rest_us}",
            tick_ms=_TICK_MS,
            memory=case.memory,
            accelerator=case.accelerator,
            binary=case.qemu,
            extra=("-qmp", f"unix:{observed},server=on,wait=off"),
            directory=Path(sockets),
        )
        try:
            with vm.start(timeout_s=300), ExitStack() as cleanup:
                observer = Observer(observed)
                cleanup.callback(observer.close)
                parts = observer.execute("query-version")["qemu"]
                numbers = (str(parts[name]) for name in ("major", "minor", "micro"))
                result.qemu_version = f"QEMU {'.'.join(numbers)}"
                threads = [cpu["thread-id"] for cpu in observer.execute("query-cpus-fast")]
                cpu_wait = CpuWait(vm.pid, threads)
                cleanup.callback(cpu_wait.close)
                subject = Subject(vm, observer, cpu_wait)
                _take_turns(subject, methods, repeat, directory, free_s, result, say)
                result.audits.append(vm.command("audit", timeout_s=300))
        except StillframeError as error:
            result.failure = str(error)
            say(f"  the case failed: {error}")
    for method in result.methods.values():
        method.spreads = spreads(method.repetitions)
    if peer in result.methods:
        theirs = result.methods[peer].spreads
        for name, method in result.methods.items():
            if name != peer:
                method.ratios = ratios(method.spreads, theirs)
    return result


def _take_turns(
    subject: Subject,
    methods: Mapping[str, Method],
    repeat: int,
    directory: Path,
    free_s: float,
    result: CaseResult,
    say: Callable[[str], None],
) -> None:
    before = free_run(subject, free_s)
    for number in range(repeat):
        for name, method in methods.items():
            found, before = _once(subject, method, directory, free_s, before)
            if isinstance(found, str):
                result.methods[name].failures.append(found)
                say(f"  {number + 1}/{repeat} {name}: failed: {found}")
            else:
                result.methods[name].repetitions.append(found)
                downtime = "-" if found.downtime_ms is None else f"{found.downtime_ms:.1f}"
                say(
                    f"  {number + 1}/{repeat} {name}: downtime {downtime} ms,"
                    f" gap {found.gap_max_ms:.1f} ms, progress {found.progress:.0%},"
                    f" durable after {found.durable_s:.2f} s"
                )


def _once(
    subject: Subject, method: Method, directory: Path, free_s: float, before: FreeRun
) -> tuple[Figures | str, FreeRun]:
    vm = subject.vm
    vm.command("reset")
    os.sync()  # keep earlier dirty pages out of the measured time
    since = vm.console.mark()
    vm.wait_tick()
    out = directory / f"stillframe-bench-{vm.pid}"
    try:
        saved = method(subject, out)
    except (StillframeError, OSError, ValueError, KeyError) as error:
        failure = f"{type(error).__name__}: {error}"
        return failure, free_run(subject, free_s)
    finally:
        out.unlink(missing_ok=True)
        out.with_suffix(".part").unlink(missing_ok=True)
    after = free_run(subject, free_s)
    during = guest_view(vm.ticks(since), saved.touched_s, saved.durable_s)
    cpu_wait = subject.cpu_wait.share(saved.touched_s, saved.durable_s)
    return figures(saved, during, before, after, cpu_wait), after
