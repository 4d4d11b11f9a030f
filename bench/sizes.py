"""The options and the output of benchmarks that run over several sizes of RAM."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.host import host_facts, numbers


def sizes_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser with ``--ram``, ``--repeat``, ``--qemu`` and ``--json``."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--ram", type=numbers, default=[256, 1024], help="MiB, a list with commas")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--qemu", default=None, help="another qemu-system-x86_64")
    parser.add_argument("--json", type=Path, default=None, help="write all that was measured")
    return parser


def show(
    results: Sequence[dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    json_path: Path | None,
) -> None:
    """Print a table of each result, and write all results as JSON."""
    for result in results:
        print(table(result), end="\n\n")
    if json_path is not None:
        json_path.write_text(json.dumps({"host": host_facts(), "results": results}, indent=1))
