"""Files from the distribution's packages, fetched with apt. Installs nothing, needs no root."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from stillframe.errors import HostError

APT_TIMEOUT_S = 180


class Wanted(NamedTuple):
    """The purpose of a package, for error messages: ``what``, and an alternative ("or do so")."""

    what: str
    otherwise: str = ""


def unpacked(package: str, scratch: str, wanted: Wanted) -> Path:
    """Download and unpack a package in a new directory below ``scratch``; return its tree.

    Raises:
        HostError: apt or dpkg is missing or fails.
    """
    place = tempfile.mkdtemp(prefix="package-", dir=scratch)
    run_apt(["apt-get", "download", package], place, wanted)
    archives = list(Path(place).glob("*.deb"))
    if len(archives) != 1:
        raise HostError(f"apt-get download {package} left {len(archives)} packages, not one")
    run_apt(["dpkg-deb", "-x", str(archives[0]), f"{place}/tree"], place, wanted)
    return Path(place) / "tree"


def dependencies(package: str, wanted: Wanted) -> str:
    """Return the output of ``apt-cache depends``; empty if the package is unknown.

    Raises:
        HostError: apt is missing or takes too long.
    """
    return run_apt(["apt-cache", "depends", package], ".", wanted, check=False)


def run_apt(
    command: list[str],
    directory: str | Path,
    wanted: Wanted,
    *,
    check: bool = True,
    timeout_s: float = APT_TIMEOUT_S,
) -> str:
    """Run one of the distribution's tools, and return its output.

    Raises:
        HostError: the tool is missing, fails (with ``check``), or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise HostError(
            f"cannot fetch {wanted.what}", why=f"{command[0]} cannot be run: {error.strerror}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot fetch {wanted.what}",
            why=f"'{' '.join(command)}' took more than {timeout_s:g} s",
        ) from error
    if check and done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        why = complaints[-1] if complaints else done.stderr.strip()[-200:]
        raise HostError(
            f"cannot fetch {wanted.what}",
            why=f"'{' '.join(command)}' failed: {why}",
            remedy=f"run 'apt-get update' {wanted.otherwise}".rstrip(),
        )
    return done.stdout
