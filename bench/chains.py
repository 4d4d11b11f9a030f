"""What a long chain costs a restore, before and after compaction, compared with a full snapshot.

    python -m bench.chains [--ram MIB] [--populate SHARE] [--rate MIB_PER_S] [--every S]
                           [--length N] [--repeat N] [--guest linux|multiboot] [--json FILE]

Watches one VM until its chain has ``length`` files, takes a full snapshot of it, and restores by
turns from that and from the chain; then compacts, and does so again, from the snapshot with the
longest chain that is left. Medians, from the command to the guest's first instruction. Aimed at:
after compaction 1.5 times the full one's at most. Nothing here fails a build.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.host import host_facts
from bench.restore import Bench
from guests.qemu import GuestVm, qemu_binary
from stillframe import api
from stillframe.store import compaction
from stillframe.store.records import Entry
from stillframe.store.store import Store

_WRITTEN_MIB = 32


def build(root: Path, options: argparse.Namespace) -> tuple[Store, Path]:
    """Make a store with a chain, and a file with a full snapshot."""
    populate_mib = int(options.ram * options.populate) - _WRITTEN_MIB
    vm = GuestVm(
        options.guest,
        ram_mib=options.ram,
        mem_mib=_WRITTEN_MIB,
        populate_mib=populate_mib,
        rate_mib_per_s=options.rate,
        tick_ms=50,
        name="bench-chains",
    )
    store = api.init(root / "store", full_every=options.length + 1)
    bound, compaction.MOST_FILES = compaction.MOST_FILES, options.length
    try:
        with vm.start(timeout_s=300):
            api.watch(str(vm.qmp_path), every_s=options.every, count=options.length, store=store)
            api.take(str(vm.qmp_path), root / "full.still").wait(300)
    finally:
        compaction.MOST_FILES = bound
    return store, root / "full.still"


def measure(files: dict[str, Path], repeat: int) -> dict[str, list[dict[str, Any]]]:
    """Restore the files in turns, so that other load on the host affects all alike. The first
    restore of each does not count: it fills the page cache and makes the working set."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for turn in range(repeat + 1):
        for name, file in files.items():
            back = Bench(file, Path("/dev/null"), qemu_binary()).by_image(working_set=True)
            if turn:
                found[name].append({"running_ms": back.running_ms, "gap_ms": back.gap_ms})
            print(f"{name}: {back.running_ms:.0f} ms", file=sys.stderr)
    return found


def longest(store: Store) -> tuple[int, Entry]:
    """Return the longest chain's length, and the newest snapshot with such a chain."""
    catalog = store.catalog()
    lengths = [(len(catalog.chain(one)), one) for one in catalog.entries.values()]
    return max(lengths, key=lambda pair: (pair[0], pair[1].time))


def medians(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.median(run[key] for run in one) for key in one[0]}
        for name, one in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ram", type=int, default=1024, help="MiB")
    parser.add_argument("--populate", type=float, default=0.5)
    parser.add_argument("--rate", type=int, default=20)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--guest", choices=["linux", "multiboot"], default="linux")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-chains-", dir="/var/tmp") as place:
        store, full = build(Path(place), options)
        files, entry = longest(store)
        before = medians(
            measure({"full": full, "chain": Path(store.location(entry))}, options.repeat)
        )
        began_s = time.monotonic()
        done = store.compact()
        compacted_s = time.monotonic() - began_s
        left, worst = longest(store)
        places = {"full": full, "compacted": Path(store.location(worst))}
        after = medians(measure(places, options.repeat))
        facts = {
            "ram_mib": options.ram,
            "chain_files": files,
            "file_mib": full.stat().st_size >> 20,
            "chain_mib": sum(one.file_bytes for one in store.list()) >> 20,
            "before": before,
            "ratio_before": round(before["chain"]["running_ms"] / before["full"]["running_ms"], 2),
            "compacted": len(done.compacted),
            "compaction_s": round(compacted_s, 1),
            "written_mib": done.written_bytes >> 20,
            "chain_files_left": left,
            "after": after,
            "ratio_after": round(after["compacted"]["running_ms"] / after["full"]["running_ms"], 2),
        }
    print(json.dumps(facts, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps({"host": host_facts(), "chains": facts}, indent=1))


if __name__ == "__main__":
    main()
