"""Compiles the guests with the host's gcc, once per content of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from stillframe.errors import HostError

SOURCES = Path(__file__).parent
_PAGE_HEADER = "src/stillframe/board/guests/programs/writer/page.h"
COMPILE_TIMEOUT_S = 60

FREESTANDING = (
    "-O2",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-m64",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-pic",
    "-no-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    # gcc would turn loops into calls of memset and memcpy, which nobody provides
    "-fno-tree-loop-distribute-patterns",
    "-mgeneral-regs-only",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,--strip-all",
)
"""A program without C library and start files, also without the FPU's registers."""


def cache_directory(kind: str) -> Path:
    """``$XDG_CACHE_HOME/stillframe/<kind>``, made if it is missing.

    Raises:
        HostError: it cannot be made.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(root).expanduser() / "stillframe" / kind
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise HostError(
            f"cannot make the cache directory {directory}",
            why=error.strerror,
            remedy="set XDG_CACHE_HOME to a directory that you may write",
        ) from error
    return directory


def common_headers() -> list[Path]:
    """Every header that both guests include."""
    return [*(SOURCES / "common").glob("*.h"), SOURCES.parent / _PAGE_HEADER]


def run_tool(command: list[str], purpose: str, *, package: str) -> None:
    """Run a build tool; its last words go into the error.

    Raises:
        HostError: the tool is missing (``package`` has it), failed, or took too long.
    """
    if shutil.which(command[0]) is None:
        raise HostError(
            f"cannot {purpose}",
            why=f"there is no {command[0]}",
            remedy=f"install it (on Debian and Ubuntu: apt-get install {package})",
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot {purpose}", why=f"{command[0]} took more than {COMPILE_TIMEOUT_S} s"
        ) from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-3:]
        raise HostError(
            f"cannot {purpose}",
            why=f"{command[0]} failed with exit code {done.returncode}: {' | '.join(last)}",
        )


def built(name: str, sources: list[Path], make: Callable[[Path, Path], None]) -> Path:
    """The cached result of ``make(scratch directory, output)``, made anew when a source changed.

    Args:
        name: of the output file; it goes into the cache beside its content's hash.
        sources: every file that the output depends on, and the module that builds it.

    Raises:
        HostError: the cache is not writable, or ``make`` raised it.
    """
    digest = hashlib.sha256()
    for source in [*sorted(sources), Path(__file__)]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    output = cache_directory("guests") / f"{digest.hexdigest()[:16]}-{name}"
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(prefix="stillframe-build-") as scratch:
        fresh = Path(scratch) / name
        make(Path(scratch), fresh)
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            shutil.copyfile(fresh, beside)
            beside.rename(output)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise HostError(f"cannot write {output}", why=error.strerror) from error
    return output
