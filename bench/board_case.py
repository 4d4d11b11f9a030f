"""One case: boards of one kind, on which all methods take turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.board_methods import BoardSaved, Method
from bench.board_vm import BoardVm, View
from bench.figures import Spread, ratios, spreads
from stillframe.errors import StillframeError

PEER = "stop"
"""The method that the others are compared with."""
_MIB = float(1 << 20)
_PARTS = ("stop_ms", "devices_ms", "protect_ms", "cont_ms")


class BoardCase(msgspec.Struct, frozen=True, kw_only=True):
    """The guest to save. ``rate_mib_per_s`` 0 is full speed; ``whole``: incompressible RAM."""

    ram_mib: int
    rate_mib_per_s: int
    whole: bool


class BoardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one save by one method; docs/reference/measurements.md defines each."""

    downtime_ms: float | None
    own_downtime_ms: float | None
    stop_ms: float | None
    devices_ms: float | None
    protect_ms: float | None
    cont_ms: float | None
    gap_max_ms: float
    free_gap_max_ms: float
    progress: float
    durable_s: float
    file_mib: float
    written_mib: float
    peak_mib: float
    faults: int | None
    cpu_wait: float
    free_cpu_wait: float
    load: float


NAMES = BoardFigures.__struct_fields__


class BoardMethodResult(msgspec.Struct, kw_only=True):
    """All repetitions of one method in one case. ``ratios``: to the method ``PEER``."""

    repetitions: list[BoardFigures] = []
    failures: list[str] = []
    spreads: dict[str, Spread] = {}
    ratios: dict[str, float] = {}


class BoardCaseResult(msgspec.Struct, kw_only=True):
    """A case and its results."""

    case: BoardCase
    methods: dict[str, BoardMethodResult]
    populated_mib: float = 0.0
    audits: list[str] = []
    failure: str | None = None


def figures(saved: BoardSaved, during: View, before: View, after: View) -> BoardFigures:
    """Combine the measurements of one save.

    Args:
        during: from the first possible effect on the guest until the file was durable.
        before, after: the undisturbed guest, right before and right after.
    """
    parts = saved.own.get("downtime") or {}
    stop_ms, devices_ms, protect_ms, cont_ms = (parts.get(name) for name in _PARTS)
    return BoardFigures(
        downtime_ms=saved.downtime_ms,
        own_downtime_ms=saved.own.get("downtime_ms"),
        stop_ms=stop_ms,
        devices_ms=devices_ms,
        protect_ms=protect_ms,
        cont_ms=cont_ms,
        gap_max_ms=during.gap_max_ms,
        free_gap_max_ms=max(before.gap_max_ms, after.gap_max_ms),
        progress=2 * during.pages_per_s / (before.pages_per_s + after.pages_per_s),
        durable_s=saved.durable_s - saved.began_s,
        file_mib=saved.file_bytes / _MIB,
        written_mib=saved.written_bytes / _MIB,
        peak_mib=saved.peak_bytes / _MIB,
        faults=saved.own.get("faults"),
        cpu_wait=during.cpu_wait,
        free_cpu_wait=(before.cpu_wait + after.cpu_wait) / 2,
        load=os.getloadavg()[0],
    )


def run_case(
    case: BoardCase,
    methods: Mapping[str, tuple[str, Method]],
    *,
    repeat: int,
    directory: Path,
    free_s: float,
    say: Callable[[str], None],
) -> BoardCaseResult:
    """Start a board for each protection, and run the methods in turns: A B C, A B C, ...

    The boards not in use are stopped. A method that fails is recorded as failed, and the others
    continue.

    Args:
        methods: by name, each with the protection of the board that it works on.
        directory: where all methods save to.
        free_s: how long the guest runs undisturbed before and after each save.
    """
    result = BoardCaseResult(case=case, methods={name: BoardMethodResult() for name in methods})
    try:
        with ExitStack() as cleanup:
            boards: dict[str, BoardVm] = {}
            for protection in dict.fromkeys(protection for protection, _ in methods.values()):
                place = tempfile.TemporaryDirectory(prefix="stillframe-bench-board-")
                boards[protection] = cleanup.enter_context(
                    BoardVm(
                        Path(cleanup.enter_context(place)),
                        protection=protection,
                        ram_mib=case.ram_mib,
                        rate_mib_per_s=case.rate_mib_per_s,
                        whole=case.whole,
                    )
                )
                boards[protection].stop()
            result.populated_mib = max(vm.populated_pages for vm in boards.values()) * 4096 / _MIB
            for number in range(repeat):
                for name, (protection, method) in methods.items():
                    found = _once(boards[protection], method, directory, free_s)
                    _record(result.methods[name], found, f"{number + 1}/{repeat} {name}", say)
            for vm in boards.values():
                vm.go_on()
                result.audits.append(vm.audit())
                vm.stop()
    except StillframeError as error:
        result.failure = str(error)
        say(f"  the case failed: {error}")
    for method_result in result.methods.values():
        method_result.spreads = spreads(method_result.repetitions, NAMES)
    if PEER in result.methods:
        theirs = result.methods[PEER].spreads
        for name, method_result in result.methods.items():
            if name != PEER:
                method_result.ratios = ratios(method_result.spreads, theirs, NAMES)
    return result


def _once(vm: BoardVm, method: Method, directory: Path, free_s: float) -> BoardFigures | str:
    out = directory / f"stillframe-bench-{vm.pid}"
    vm.go_on()
    os.sync()  # keep earlier dirty pages out of the measured time
    try:
        before = vm.alone(free_s)
        since = vm.console.mark()
        vm.wait_tick()
        saved = method(vm, out)
        vm.wait_tick()
        vm.wait_tick()
        during = vm.view(since, saved.touched_s, saved.durable_s)
        return figures(saved, during, before, vm.alone(free_s))
    except (StillframeError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        out.unlink(missing_ok=True)
        vm.stop()


def _record(
    result: BoardMethodResult, found: BoardFigures | str, turn: str, say: Callable[[str], None]
) -> None:
    if isinstance(found, str):
        result.failures.append(found)
        say(f"  {turn}: failed: {found}")
        return
    result.repetitions.append(found)
    downtime = found.downtime_ms if found.own_downtime_ms is None else found.own_downtime_ms
    say(
        f"  {turn}: downtime {downtime or 0:.2f} ms, gap {found.gap_max_ms:.1f} ms,"
        f" progress {found.progress:.0%}, durable after {found.durable_s:.2f} s"
    )
