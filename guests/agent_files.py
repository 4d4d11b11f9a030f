"""The Linux guest's files for a QEMU guest agent: the program, its libraries, and a disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from guests.build import built, cache_directory, run_tool
from guests.packages import Wanted, dependencies, unpacked
from stillframe.errors import HostError

INSTALLED = Path("/usr/sbin/qemu-ga")
PACKAGE = "qemu-guest-agent"
WANTED = Wanted("a QEMU guest agent for the guest", f"or install {PACKAGE}")
DISK_SERIAL = "sf-data"
"""The serial by which the guest's init recognizes the disk (``linux/agent.h``)."""
DISK_BYTES = 16 << 20
LDD_TIMEOUT_S = 30


def agent_files() -> dict[str, Path]:
    """Return the program and its libraries by their names in the guest (relative to its root).

    The program is the installed one, or the one fetched earlier, or the distribution's package,
    fetched into the cache. Libraries are the host's; missing ones are fetched, too.

    Raises:
        HostError: a file cannot be fetched.
    """
    cache = cache_directory("agent")
    program = INSTALLED if INSTALLED.is_file() else cache / "qemu-ga"
    if not program.is_file():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            (unpacked(PACKAGE, scratch, WANTED) / "usr/sbin/qemu-ga").rename(program)
    listing = _ldd(program, cache)
    if missing_libraries(listing):
        _fetch_libraries(missing_libraries(listing), cache)
        listing = _ldd(program, cache)
    missing = missing_libraries(listing)
    if missing:
        raise HostError(
            f"cannot fetch {WANTED.what}",
            why=f"no package that it depends on holds {', '.join(missing)}",
            remedy=f"install {PACKAGE}",
        )
    return {"bin/qemu-ga": program} | needed_libraries(listing)


def missing_libraries(listing: str) -> list[str]:
    """Return the names of the libraries that ldd(1) did not find."""
    return re.findall(r"^\s*(\S+) => not found$", listing, re.MULTILINE)


def needed_libraries(listing: str) -> dict[str, Path]:
    """Return the files that ldd(1) found, by their names in the guest: the loader at the path that
    the program names, the others where LD_LIBRARY_PATH points."""
    found = {
        f"lib/{name}": Path(path)
        for name, path in re.findall(r"^\s*(\S+) => (/\S+) \(0x", listing, re.MULTILINE)
    }
    for loader in re.findall(r"^\s*/(\S+) \(0x", listing, re.MULTILINE):
        found[loader] = Path("/") / loader
    return found


def _ldd(program: Path, libraries: Path) -> str:
    try:
        done = subprocess.run(
            ["ldd", str(program)],
            capture_output=True,
            text=True,
            timeout=LDD_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C", "LD_LIBRARY_PATH": str(libraries)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"cannot fetch {WANTED.what}", why=str(error)) from error
    if done.returncode != 0:
        raise HostError(f"cannot fetch {WANTED.what}", why=f"ldd: {done.stderr.strip()[-200:]}")
    return done.stdout


def _fetch_libraries(names: list[str], cache: Path) -> None:
    """Fetch libraries from the packages that the agent's package depends on."""
    packages = re.findall(r"Depends: (lib\S+)", dependencies(PACKAGE, WANTED))
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        for package in packages:
            tree = unpacked(package, scratch, WANTED)
            for name in names:
                for path in tree.rglob(name):
                    beside = Path(scratch) / name
                    shutil.copyfile(path, beside)  # the path may be a symbolic link
                    beside.rename(cache / name)


def data_disk_image() -> Path:
    """Return a small disk with an empty ext4 file system, made in the cache.

    Raises:
        HostError: mkfs.ext4 is missing or fails, or the cache cannot be written.
    """

    def make(_scratch: Path, output: Path) -> None:
        with output.open("wb") as file:
            file.truncate(DISK_BYTES)
        program = shutil.which("mkfs.ext4") or "/usr/sbin/mkfs.ext4"  # not in every user's PATH
        # initialize everything now: the guest's kernel would otherwise write it at some point
        options = "lazy_itable_init=0,lazy_journal_init=0"
        command = [program, "-q", "-F", "-E", options, str(output)]
        run_tool(command, "make the guest agent's disk", package="e2fsprogs")

    return built("data.ext4", [Path(__file__)], make)


def data_disk(path: Path) -> Path:
    """Copy the data disk to ``path``, for a guest to mount and freeze.

    Raises:
        HostError: the disk cannot be made, or the file cannot be written.
    """
    source = data_disk_image()
    try:
        shutil.copyfile(source, path)
    except OSError as error:
        raise HostError(f"cannot write {path}", why=error.strerror) from error
    return path
