"""``stillframe take``: snapshot a running VM while it runs."""

from __future__ import annotations

import queue
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from stillframe.cli.cancelling import CancelRequests
from stillframe.cli.options import (
    RATE,
    SPILL,
    VmType,
    compression_option,
    force_option,
    json_option,
    output_option,
    quiet_option,
)
from stillframe.cli.output import Results, say
from stillframe.cli.progress import Progress, choose_progress
from stillframe.cli.quantities import format_bytes, format_seconds
from stillframe.cli.take_result import as_json_object, as_lines

if TYPE_CHECKING:
    from stillframe.api import Compression, Mode, SnapshotJob, Statistics, TakenSnapshot

_POLL_S = 0.1
_AFTER_DOWNTIME = ("saving", "syncing")


@click.command("take", short_help="Snapshot the running VM while it runs.")
@click.argument("vm", type=VmType())
@output_option("The snapshot file to make; - is standard output.")
@compression_option
@click.option(
    "--spill",
    type=SPILL,
    default="256M",
    show_default=True,
    help="Most memory for pages that the guest overwrites before they are written."
    " When it is full, the guest waits.",
)
@click.option(
    "--max-bandwidth",
    type=RATE,
    help="Write at most so many bytes per second, such as 100M.",
)
@click.option(
    "--mode",
    type=click.Choice(["background", "stop"]),
    default="background",
    show_default=True,
    help="stop keeps the VM stopped while it is saved: for VMs whose RAM cannot be"
    " write-protected.",
)
@click.option(
    "--arm/--no-arm",
    default=True,
    show_default=True,
    help="Protect RAM before the VM is stopped, so that the downtime does not grow with RAM.",
)
@force_option
@quiet_option
@json_option
def command(
    vm: str,
    output: str,
    compression: tuple[Compression, int | None],
    spill: int,
    max_bandwidth: int | None,
    mode: Mode,
    arm: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Snapshot the running VM while it runs.

    VM is its QMP socket, host:port, pid or name; 'stillframe ps' lists them. The guest stands
    still for some milliseconds. Ctrl-C cancels; the guest runs on.
    """
    from stillframe import api

    sink = api.standard_output() if output == "-" else output
    progress = choose_progress(quiet=quiet)
    events: queue.SimpleQueue[Statistics] = queue.SimpleQueue()
    with CancelRequests() as requests:
        try:
            if progress.animated:
                progress.show("preparing")
            job = api.take(
                vm,
                sink,
                compression=compression[0],
                level=compression[1],
                spill_bytes=spill,
                max_bandwidth_bytes_per_s=max_bandwidth,
                mode=mode,
                arm=arm,
                overwrite=force,
                on_progress=_phases_into(events),
            )
            try:
                taken = _follow(job, events, progress, requests)
            except BaseException:
                _end(job)
                raise
        finally:
            progress.close()
    Results(as_json=as_json, to_stderr=output == "-").show(as_json_object(taken), as_lines(taken))


class _phases_into:  # noqa: N801 - called like a function
    """A progress callback that keeps the first report of each phase."""

    def __init__(self, events: queue.SimpleQueue[Statistics]) -> None:
        self._events = events
        self._phase = ""

    def __call__(self, statistics: Statistics) -> None:
        if statistics.phase != self._phase:
            self._phase = statistics.phase
            self._events.put(statistics)


def _follow(
    job: SnapshotJob,
    events: queue.SimpleQueue[Statistics],
    progress: Progress,
    requests: CancelRequests,
) -> TakenSnapshot:
    """Wait for the job's end, show its progress, and pass a request to cancel on."""
    heard = 0
    while True:
        try:
            return job.wait(_POLL_S)
        except TimeoutError:
            if job.done():
                raise
        if requests.count > heard:
            heard += 1
            if heard == 1:
                job.cancel()
            say(_CANCELLING if heard == 1 else _STILL_CANCELLING)
        while not events.empty():
            statistics = events.get()
            if not progress.animated:
                _show(progress, statistics)
        statistics = job.stats
        # A bar that is drawn in the downtime would make it longer.
        if statistics.phase in _AFTER_DOWNTIME and not heard:
            _show(progress, statistics)


def _end(job: SnapshotJob) -> None:
    """Whatever happened to us, the job gives back what it set up."""
    job.cancel()
    with suppress(BaseException):
        job.wait()


def _show(progress: Progress, statistics: Statistics) -> None:
    details: list[str] = []
    if statistics.phase == "saving":
        if statistics.eta_s is not None:
            details.append(f"about {format_seconds(statistics.eta_s)} left")
        details.append(f"writing {format_bytes(statistics.rate_bytes_per_s)}/s")
        details.append(f"{statistics.faults} faults")
        details.append(
            f"spill {format_bytes(statistics.spill_used_bytes)}"
            f" of {format_bytes(statistics.spill_limit_bytes)}"
        )
    progress.show(
        statistics.phase, statistics.ram_done_bytes, statistics.ram_bytes, ", ".join(details)
    )


_CANCELLING = "stillframe: cancelling; the guest goes on"
_STILL_CANCELLING = "stillframe: already cancelling; please wait"
