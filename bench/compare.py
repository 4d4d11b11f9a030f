"""Stillframe, QEMU's own background snapshot, and stop-and-save, on the same VM and disk.

Run as ``python -m bench.compare``; docs/reference/measurements.md says what the figures mean.
It records: its exit code does not depend on any figure.
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

from bench.case import Case, CaseResult, run_case
from bench.host import host_facts, numbers
from bench.methods import Method, qemu_background, stop_and_save, take
from bench.table import case_table
from bench.targets import targets_text

PEER = "qemu"
METHODS = ("take", "take-none", "qemu", "qemu-zstd", "stop")
_DEFAULT_METHODS = "take,take-none,qemu,stop"
_LEFT_TO_THE_GUEST_MIB = {"linux": 96, "multiboot": 16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--ram", type=numbers, default=[256, 1024], help="MiB of RAM, a list with commas")
    add("--rate", type=numbers, default=[20], help="MiB/s written, a list; 0 is full speed")
    add("--rest-us", type=int, default=0, help="the guest rests so long when it need not write")
    add("--mem", type=int, default=64, help="MiB that are written over and over (working set)")
    add("--populate", default="75%", help="MiB filled once and left alone, or a part of RAM")
    add("--fill", default="random", help="with what: random, text, zero; a list")
    add("--memory", default="memfd", choices=["private", "memfd", "shm", "hugetlb"])
    add("--guest", default="linux", choices=["linux", "multiboot"])
    add("--accel", default="tcg", choices=["tcg", "kvm"])
    add("--methods", default=_DEFAULT_METHODS, help=f"of {', '.join(METHODS)}; a list")
    add("--repeat", type=int, default=3)
    add("--spill", default=None, help="take --spill, as the command takes it")
    add("--take", default=None, help="another command than 'python -m stillframe take'")
    add("--qemu", default=None, help="another qemu-system-x86_64")
    add("--directory", type=Path, default=Path("."), help="where all methods save to")
    add("--free-s", type=float, default=2.0, help="seconds the guest is left alone between two")
    add("--json", type=Path, default=None, help="write everything that was measured")
    return parser


def _populate_mib(text: str, guest: str, ram_mib: int, mem_mib: int) -> int:
    most = max(0, ram_mib - mem_mib - _LEFT_TO_THE_GUEST_MIB[guest])
    wanted = ram_mib * int(text[:-1]) // 100 if text.endswith("%") else int(text)
    return min(wanted, most)


def _methods(options: argparse.Namespace) -> dict[str, Method]:
    program = (
        shlex.split(options.take) if options.take else [sys.executable, "-m", "stillframe", "take"]
    )
    spill = ["--spill", options.spill] if options.spill else []
    known: dict[str, Method] = {
        "take": take(program, spill),
        "take-none": take(program, [*spill, "--compression", "none"]),
        "qemu": qemu_background("cat"),
        "qemu-zstd": qemu_background("zstd -q -1 -T0"),
        "stop": stop_and_save("cat"),
    }
    return {name: known[name] for name in options.methods.split(",")}


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(
            guest=options.guest,
            ram_mib=ram_mib,
            populate_mib=_populate_mib(options.populate, options.guest, ram_mib, options.mem),
            fill=fill,
            mem_mib=options.mem,
            rate_mib_per_s=rate,
            rest_us=options.rest_us,
            memory=options.memory,
            accelerator=options.accel,
            qemu=options.qemu,
        )
        for rate in options.rate
        for fill in options.fill.split(",")
        for ram_mib in options.ram
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the selected cases; print tables, and write the JSON after each case."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        methods = _methods(options)
    except KeyError as error:
        parser.error(f"no method {error}; known: {', '.join(METHODS)}")
    report: dict[str, Any] = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.compare", *(arguments or sys.argv[1:])]),
        "host": host_facts(),
        "peer": PEER,
        "cases": [],
    }
    results: list[CaseResult] = []
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir=options.directory) as name:
        for case in _cases(options):
            print(f"{case.ram_mib} MiB, {case.rate_mib_per_s} MiB/s, {case.fill} ...", flush=True)
            result = run_case(
                case,
                methods,
                repeat=options.repeat,
                directory=Path(name),
                free_s=options.free_s,
                peer=PEER,
                say=lambda text: print(text, flush=True),
            )
            results.append(result)
            report["cases"].append(msgspec.to_builtins(result))
            print(f"\n{case_table(result, PEER)}\n", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(targets_text(results, PEER))
    return 0


if __name__ == "__main__":
    sys.exit(main())
