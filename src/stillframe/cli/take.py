"""``stillframe take``: snapshot a running VM while it runs."""

from __future__ import annotations

import queue
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from stillframe.cli.cancelling import CancelRequests
from stillframe.cli.keys import encrypt_with_keys_options
from stillframe.cli.options import (
    compression_option,
    disks_option,
    force_option,
    json_option,
    max_drain_option,
    output_option,
    parent_dir_option,
    quiet_option,
    spill_option,
    store_option,
)
from stillframe.cli.output import Results, say
from stillframe.cli.parameters import FILE, RATE, VmType
from stillframe.cli.progress import Progress, choose_progress
from stillframe.cli.quantities import format_bytes, format_seconds
from stillframe.cli.take_result import as_json_object, as_lines

if TYPE_CHECKING:
    from stillframe.api import (
        Compression,
        DataKey,
        DiskKind,
        Keys,
        Mode,
        SnapshotJob,
        Statistics,
        TakenSnapshot,
    )

_POLL_S = 0.1
_COPYING = "copying disks"
_AFTER_DOWNTIME = ("saving", _COPYING, "syncing")


@click.command("take", short_help="Snapshot the running VM while it runs.")
@click.argument("vm", type=VmType())
@output_option(
    "The snapshot file to make; - is standard output.  [default: it goes into the store]",
    required=False,
)
@store_option
@click.option(
    "--full", is_flag=True, help="Save all, and not only what changed since the store's last."
)
@click.option("--tag", "tags", multiple=True, help="Of the snapshot in the store.")
@compression_option
@spill_option(" When it is full, the guest waits.")
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
@click.option(
    "--parent",
    type=FILE,
    metavar="FILE",
    help="Save only what changed since that snapshot, which is needed from then on.",
)
@click.option(
    "--for-analysis",
    is_flag=True,
    help="Save RAM only, without device state: also of a VM with a device that cannot be saved."
    " Such a snapshot cannot be restored.",
)
@disks_option(
    ["copy", "overlay", "none"],
    "The VM's disks at the instant: copied while it runs on; or frozen, and the VM goes on in"
    " overlays until 'stillframe commit'; or left out.",
)
@click.option(
    "--disks-dir",
    type=FILE,
    metavar="DIR",
    help="Where copies and overlays go, instead of FILE.disks and beside the images.",
)
@max_drain_option
@click.option(
    "--quiesce", is_flag=True, help="Let the guest's agent freeze its file systems meanwhile."
)
@click.option(
    "--libvirt-snapshot",
    metavar="NAME",
    help="Of a libvirt domain: make it one of libvirt's own snapshots, for 'virsh snapshot-revert'"
    " (libvirt 9.9 or newer).",
)
@click.option(
    "--image",
    is_flag=True,
    help="Keep its complete image, too: VMs are started on that at once ('stillframe image').",
)
@force_option
@quiet_option
@parent_dir_option
@json_option
@encrypt_with_keys_options
def command(
    vm: str,
    output: str | None,
    full: bool,
    tags: tuple[str, ...],
    compression: tuple[Compression, int | None],
    spill: int,
    max_bandwidth: int | None,
    mode: Mode,
    arm: bool,
    parent: str | None,
    for_analysis: bool,
    disks: DiskKind,
    disks_dir: str | None,
    max_drain: float,
    quiesce: bool,
    libvirt_snapshot: str | None,
    image: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    key: DataKey | None,
    keys: Keys,
) -> None:
    """Snapshot the running VM while it runs, into the store or into a file.

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
                full=full,
                tags=tags,
                compression=compression[0],
                level=compression[1],
                spill_bytes=spill,
                max_bandwidth_bytes_per_s=max_bandwidth,
                mode=mode,
                arm=arm,
                parent=parent,
                for_analysis=for_analysis,
                disks=disks,
                disks_directory=disks_dir,
                max_drain_ms=max_drain,
                quiesce=quiesce,
                libvirt_snapshot=libvirt_snapshot,
                image=image,
                key=key,
                keys=keys,
                overwrite=force,
                on_progress=_phases_into(events),
            )
            try:
                taken = _follow(job, events, progress, requests, quiet=quiet)
            except BaseException:
                _end(job)
                raise
        finally:
            progress.close()
    Results(as_json=as_json, to_stderr=output == "-").show(as_json_object(taken), as_lines(taken))


class _phases_into:  # noqa: N801 - called like a function
    """A progress callback that queues the first report of each phase."""

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
    *,
    quiet: bool,
) -> TakenSnapshot:
    """Wait for the job's end, show its progress, and pass on a request to cancel."""
    heard = 0
    disks_said = quiet
    while True:
        try:
            return job.wait(_POLL_S)
        except TimeoutError:
            if job.done():  # it may have ended right after the timeout
                return job.wait()
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
        if statistics.disks and not disks_said:
            disks_said = True
            say(f"stillframe: disks: {statistics.disks}")
        # Drawing a bar during the downtime would lengthen it.
        if statistics.phase in _AFTER_DOWNTIME and not heard:
            _show(progress, statistics)


def _end(job: SnapshotJob) -> None:
    """Cancel the job and wait until it has undone what it set up."""
    job.cancel()
    with suppress(BaseException):
        job.wait()


def _show(progress: Progress, statistics: Statistics) -> None:
    details: list[str] = []
    if statistics.phase == _COPYING:
        progress.show(_COPYING, statistics.disk_done_bytes, statistics.disk_bytes or None)
        return
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
