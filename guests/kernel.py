"""The guest's Linux kernel: found on the host, or fetched from the distribution."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guests.build import cache_directory
from guests.packages import Wanted, dependencies, unpacked
from stillframe.errors import HostError

META_PACKAGE = "linux-image-cloud-amd64"
OTHERWISE = "or set STILLFRAME_KERNEL to a bzImage for x86-64"
WANTED = Wanted("a Linux kernel for the guest", OTHERWISE)


def find_kernel() -> Path:
    """Find a bootable x86-64 Linux image that this user can read.

    In this order: ``$STILLFRAME_KERNEL``, the newest ``/boot/vmlinuz-*``, one fetched earlier
    (``$XDG_CACHE_HOME/stillframe/kernel``), Debian's cloud kernel, fetched with apt into that
    cache. Nothing is installed, and root is not needed.

    Raises:
        HostError: none of these works; the error says what to do.
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
    """Download and unpack the kernel package; keep only the image."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HostError(
                "found no Linux kernel for the guest",
                why=f"/boot has none that you can read, and there is no {tool} to fetch one",
                remedy=f"make /boot/vmlinuz-* readable {OTHERWISE}",
            )
    package = _concrete_package()
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        images = list(unpacked(package, scratch, WANTED).glob("boot/vmlinuz-*"))
        if len(images) != 1:
            raise HostError(f"the package {package} holds {len(images)} kernels, not one")
        kernel = cache / images[0].name
        images[0].chmod(0o644)
        images[0].rename(kernel)
    return kernel


def kernel_modules(names: Sequence[str]) -> list[Path]:
    """Return modules of the kernel that :func:`find_kernel` finds, each after its dependencies.

    They come from ``/lib/modules``, or from the kernel's package, fetched into the cache. A missing
    module is taken to be built in.

    Raises:
        HostError: the package cannot be fetched.
    """
    version = find_kernel().name.removeprefix("vmlinuz-")
    root = Path("/lib/modules") / version
    if not root.is_dir():
        root = cache_directory("kernel") / f"modules-{version}"
        if not root.is_dir():
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root.parent) as scratch:
                tree = unpacked(f"linux-image-{version}", scratch, WANTED)
                try:
                    next(tree.glob("lib/modules/*")).rename(root)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise  # otherwise another process has put them there
    found = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        path = found.get(name.replace("-", "_"))
        if path is None or path.stem in ordered:
            return
        needs = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in needs.group(1).decode().split(",") if needs else ():
            add(other)
        ordered[path.stem] = path

    for name in names:
        add(name)
    return list(ordered.values())


def _concrete_package() -> str:
    """Return the image package that the meta package depends on."""
    listing = dependencies(META_PACKAGE, WANTED)
    match = re.search(r"Depends: (linux-image-\S*\d\S*)", listing)
    if match is None:
        raise HostError(
            "cannot fetch a Linux kernel for the guest",
            why=f"apt does not know the package {META_PACKAGE}",
            remedy=f"run 'apt-get update' {OTHERWISE}",
        )
    return match.group(1)
