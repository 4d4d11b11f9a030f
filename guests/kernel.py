"""Finds a Linux kernel for the guest, and fetches the distribution's one if there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from guests.build import cache_directory
from stillframe.errors import HostError

META_PACKAGE = "linux-image-cloud-amd64"
APT_TIMEOUT_S = 180
OTHERWISE = "or set STILLFRAME_KERNEL to a bzImage for x86-64"


def find_kernel() -> Path:
    """A bootable x86-64 Linux image that this user can read.

    In this order: ``$STILLFRAME_KERNEL``, the newest ``/boot/vmlinuz-*``, one fetched earlier
    (``$XDG_CACHE_HOME/stillframe/kernel``), Debian's cloud kernel fetched with apt into that
    cache. Nothing is installed, and root is not needed.

    Raises:
        HostError: none of them works; the error says what to do.
    """
    named = os.environ.get("STILLFRAME_KERNEL")
    if named:
        path = Path(named)
        if not _readable(path):
            raise HostError(f"STILLFRAME_KERNEL names {named}, which is not a readable file")
        return path
    cache = cache_directory("kernel")
    for directory in (Path("/boot"), cache):
        found = [path for path in directory.glob("vmlinuz-*") if _readable(path)]
        if found:
            return max(found, key=_version_key)
    return _fetch(cache)


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _version_key(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _fetch(cache: Path) -> Path:
    """Download and unpack the kernel package; only the image stays."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HostError(
                "found no Linux kernel for the guest",
                why=f"/boot has none that you can read, and there is no {tool} to fetch one",
                remedy=f"make /boot/vmlinuz-* readable {OTHERWISE}",
            )
    package = _concrete_package()
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        _apt(["apt-get", "download", package], scratch)
        archives = list(Path(scratch).glob("*.deb"))
        if len(archives) != 1:
            raise HostError(f"apt-get download {package} left {len(archives)} packages, not one")
        _apt(["dpkg-deb", "-x", str(archives[0]), f"{scratch}/tree"], scratch)
        images = list(Path(scratch).glob("tree/boot/vmlinuz-*"))
        if len(images) != 1:
            raise HostError(f"the package {package} holds {len(images)} kernels, not one")
        kernel = cache / images[0].name
        images[0].chmod(0o644)
        images[0].rename(kernel)
    return kernel


def _concrete_package() -> str:
    """The package with the image that the meta package depends on."""
    listing = _apt(["apt-cache", "depends", META_PACKAGE], ".", check=False)
    match = re.search(r"Depends: (linux-image-\S*\d\S*)", listing)
    if match is None:
        raise HostError(
            "cannot fetch a Linux kernel for the guest",
            why=f"apt does not know the package {META_PACKAGE}",
            remedy=f"run 'apt-get update' {OTHERWISE}",
        )
    return match.group(1)


def _apt(command: list[str], directory: str, *, check: bool = True) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=APT_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            "cannot fetch a Linux kernel for the guest",
            why=f"'{' '.join(command)}' took more than {APT_TIMEOUT_S} s",
        ) from error
    if check and done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        why = complaints[-1] if complaints else done.stderr.strip()[-200:]
        raise HostError(
            "cannot fetch a Linux kernel for the guest",
            why=f"'{' '.join(command)}' failed: {why}",
            remedy=f"run 'apt-get update' {OTHERWISE}",
        )
    return done.stdout
