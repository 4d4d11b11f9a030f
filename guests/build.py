"""The build of the guests with the host's gcc, cached by the content of their sources."""

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
    # gcc would turn loops into calls of memset and memcpy, which do not exist here
    "-fno-tree-loop-distribute-patterns",
    "-mgeneral-regs-only",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,--strip-all",
)
"""gcc options for a program without C library, start files and FPU registers."""


def cache_directory(kind: str) -> Path:
    """Return ``$XDG_CACHE_HOME/stillframe/<kind>``; make it if it is missing.

    Raises:
        HostError: the directory cannot be made.
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
    """Return the headers that both guests include."""
    return [*(SOURCES / "common").glob("*.h"), SOURCES.parent / _PAGE_HEADER]


def run_tool(command: list[str], purpose: str, *, package: str) -> None:
    """Run a build tool; an error contains the end of its output.

    Raises:
        HostError: the tool is missing (``package`` provides it), failed, or took too long.
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
    """Return the cached result of ``make(scratch directory, output)``; remake it if a source has
    changed.

    Args:
        name: the output file's name; the cached file's name is a hash of the sources plus this.
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
