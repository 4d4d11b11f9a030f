"""What disks add to the downtime: without, copied and frozen, beside the peers, in one run.

    python -m bench.disks [--takes N] [--workers N] [--no-libvirt]

One VM with the journal guest, whose workers (32 of them) write and read back, each on both of its
first two disks; with four disks two are idle. Then one whose four disks are throttled, so that each
of 32 writers has a request in flight at any time, all of which the stop has to wait for ("drain").
Then a domain of libvirt with the same disks as the first. Prints the median and the smallest
downtime in milliseconds, the median without the drain, and the parts; that of the peers between
QEMU's STOP and RESUME, which leaves out what the STOP itself took (the drain). The kinds take
turns, so that a busy host is busy for all of them.

* ``background-snapshot``: QEMU's own; no disks.
* ``virsh snapshot``: ``virsh snapshot-create-as --memspec --live``, all disks in external overlays.

Nothing here fails a build.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.cpu_wait import CpuWait
from bench.domain_events import DomainEvents
from bench.methods import Subject, qemu_background
from bench.observer import Observer
from guests.domain import GuestDomain
from guests.journal import DISK_BYTES
from guests.qemu import GuestVm
from stillframe import api
from stillframe.disks.images import qemu_img
from stillframe.model import Downtime

_PARTS = ("stop_ms", "drain_ms", "devices_ms", "disks_ms", "protect_ms", "cont_ms")
_KINDS = ("none", "copy", "overlay")
_IDLE_DISK_BYTES = 256 << 20


def _disks(directory: Path, count: int) -> list[Path]:
    disks = [directory / f"disk{number}.qcow2" for number in range(count)]
    for number, disk in enumerate(disks):
        size = DISK_BYTES[number] if number < len(DISK_BYTES) else _IDLE_DISK_BYTES
        qemu_img(["create", "-q", "-f", "qcow2", str(disk), str(size)], "no disk")
    return disks


def _downtimes(
    vm: str, directory: Path, kinds: Sequence[Any], takes: int
) -> dict[str, list[Downtime]]:
    found: dict[str, list[Downtime]] = {kind: [] for kind in kinds}
    for number in range(takes):
        for kind in kinds:
            file = directory / f"{kind}-{number}.still"
            taken = api.take(vm, file, disks=kind, max_drain_ms=10_000).wait(300)
            found[kind].append(taken.statistics.downtime)
            file.unlink()
            shutil.rmtree(f"{file}.disks", ignore_errors=True)
            if kind == "overlay":
                api.commit(vm)
    return found


def _row(count: int, kind: str, found: list[Downtime]) -> str:
    total = [one.total_ms for one in found]
    undrained = statistics.median(one.total_ms - one.drain_ms for one in found)
    parts = "  ".join(
        f"{name.removesuffix('_ms')} {statistics.median(getattr(one, name) for one in found):.1f}"
        for name in _PARTS
    )
    return (
        f"{count} disks  {kind:8} median {statistics.median(total):6.1f}"
        f"  least {min(total):6.1f}  without drain {undrained:6.1f}   {parts}"
    )


def _plain_row(count: int, name: str, found: list[float]) -> str:
    return (
        f"{count} disks  {name:8} median {statistics.median(found):6.1f}  least {min(found):6.1f}"
        "   between STOP and RESUME"
    )


def _journal(workers: int) -> str:
    return f"sf.journal={workers} sf.rest_us=2000"


def _guest(directory: Path, count: int, append: str, limit: str = "") -> GuestVm:
    words = [f"file={disk},if=virtio,format=qcow2{limit}" for disk in _disks(directory, count)]
    extra = [word for drive in words for word in ("-drive", drive)]
    extra += ["-qmp", f"unix:{directory}/observer.sock,server=on,wait=off"]
    return GuestVm("linux", vcpus=2, rate_mib_per_s=2, mem_mib=8, append=append, extra=extra)


def _with_qemu(directory: Path, count: int, takes: int, workers: int) -> None:
    vm = _guest(directory, count, _journal(workers))
    with vm.start():
        for kind, taken in _downtimes(str(vm.qmp_path), directory, _KINDS, takes).items():
            print(_row(count, kind, taken))
        observer = Observer(directory / "observer.sock")
        threads = [cpu["thread-id"] for cpu in observer.execute("query-cpus-fast")]
        subject, found = Subject(vm, observer, CpuWait(vm.pid, threads)), []
        for _ in range(takes):
            saved = qemu_background("cat")(subject, directory / "background")
            found.append(saved.downtime_ms or 0.0)
            (directory / "background").unlink()
        print(_plain_row(count, "background-snapshot", found))
        observer.close()


def _in_flight(directory: Path, count: int, takes: int, workers: int) -> None:
    append = f"sf.load={workers} sf.load_disks={count} sf.rest_us=2000"
    # QEMU lifts its own throttling while it drains, so the host's time for the requests remains.
    with _guest(directory, count, append, ",throttling.iops-total=20").start() as vm:
        for kind, taken in _downtimes(str(vm.qmp_path), directory, _KINDS, takes).items():
            print(f"{workers} requests in flight, ", _row(count, kind, taken))


@contextmanager
def _domain(directory: Path, count: int, workers: int) -> Iterator[GuestDomain]:
    xml = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{disk}'/><target dev='vd{'abcd'[number]}' bus='virtio'/></disk>"
        for number, disk in enumerate(_disks(directory, count))
    )
    with GuestDomain(
        extra_devices=xml, disks=True, mem_mib=8, rate_mib_per_s=2, append=_journal(workers)
    ) as domain:
        yield domain


def _with_libvirt(directory: Path, count: int, takes: int, workers: int) -> None:
    with _domain(directory, count, workers) as domain:
        kinds = ("none", "copy")
        for kind, taken in _downtimes(domain.name, directory, kinds, takes).items():
            print("libvirt ", _row(count, kind, taken))
        events, standing = DomainEvents(domain.uri, domain.name), []
        for number in range(takes):
            began_s = time.time()
            memory = f"file={directory}/{number}.mem,snapshot=external"
            name = f"bench-{number}"
            words = ["--memspec", memory, "--live", "--no-metadata"]
            domain.virsh("snapshot-create-as", domain.name, name, *words)
            standing.append(events.stopped_ms(began_s))
        print("libvirt ", _plain_row(count, "virsh snapshot", standing))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--takes", type=int, default=10)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--no-libvirt", action="store_true")
    options = parser.parse_args()
    runs = [(_with_qemu, 2), (_with_qemu, 4), (_in_flight, 4)]
    if not options.no_libvirt:
        runs.append((_with_libvirt, 4))
    for run, count in runs:
        directory = Path(tempfile.mkdtemp(prefix="bench-disks-", dir="/var/tmp"))
        try:
            directory.chmod(0o755)
            run(directory, count, options.takes, options.workers)
        finally:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
