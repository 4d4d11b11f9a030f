"""A board saved from inside, from outside, and by stop-and-save, to the same disk.

Run as ``python -m bench.board``; docs/reference/measurements.md says what the figures mean. It
records: its exit code does not depend on any figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bench.board_case import BoardCase, BoardCaseResult, run_case
from bench.board_methods import Method, inside, stop_and_save, take
from bench.board_table import case_table, targets_text
from bench.host import host_facts, numbers

METHODS: dict[str, tuple[str, Method]] = {
    "inside": ("auto", inside),
    "inside-mprotect": ("mprotect", inside),
    "take": ("auto", take([])),
    "take-none": ("auto", take(["--compression", "none"])),
    "stop": ("auto", stop_and_save),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.board", description=__doc__)
    add = parser.add_argument
    add("--ram", type=numbers, default=[256], help="MiB of RAM, a list with commas")
    add("--rate", type=numbers, default=[20], help="MiB/s written, a list; 0 is full speed")
    add("--whole", action="store_true", help="write every word of a page: it does not compress")
    add("--methods", default=",".join(METHODS), help="a list")
    add("--repeat", type=int, default=5)
    add("--directory", type=Path, default=Path("."), help="where all methods save to")
    add("--free-s", type=float, default=1.5, help="seconds the guest is left alone each time")
    add("--json", type=Path, default=None, help="write everything that was measured")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the selected cases; print tables, and write the JSON after each case."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods.split(",") if name not in METHODS]
    if unknown:
        parser.error(f"no method {unknown[0]}; known: {', '.join(METHODS)}")
    methods = {name: METHODS[name] for name in options.methods.split(",")}
    report: dict[str, Any] = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.board", *(arguments or sys.argv[1:])]),
        "host": host_facts(),
        "cases": [],
    }
    results: list[BoardCaseResult] = []
    cases = [
        BoardCase(ram_mib=ram_mib, rate_mib_per_s=rate, whole=options.whole)
        for rate in options.rate
        for ram_mib in options.ram
    ]
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir=options.directory) as name:
        for case in cases:
            print(f"{case.ram_mib} MiB, {case.rate_mib_per_s} MiB/s ...", flush=True)
            result = run_case(
                case,
                methods,
                repeat=options.repeat,
                directory=Path(name).absolute(),
                free_s=options.free_s,
                say=lambda text: print(text, flush=True),
            )
            results.append(result)
            report["cases"].append(msgspec.to_builtins(result))
            print(f"\n{case_table(result)}\n", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(targets_text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
