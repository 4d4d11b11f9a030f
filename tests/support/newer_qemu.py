"""A QEMU newer than the distribution's, for tests of what differs between versions.

``$STILLFRAME_NEWER_QEMU`` may name one. Else the PATH's own is taken if it is new enough, and else
Debian's backports package is fetched with apt, with the dependencies that are not installed, and
unpacked (not installed) into ``$XDG_CACHE_HOME/stillframe/newer-qemu``; root is not needed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from guests.build import cache_directory
from guests.packages import Wanted, run_apt
from guests.qemu import qemu_binary
from stillframe.errors import HostError

OLDEST = (9, 0)
"""From here on suspended guests migrate, and the stream's globalstate has its present form."""
_PACKAGE = "qemu-system-x86"
_MODULES = ("qemu-block-extra", "qemu-system-modules-opengl", "qemu-system-modules-spice")
"""Where one is missing, QEMU finds the installed QEMU's module of that name, and aborts."""
_APT_TIMEOUT_S = 300
_OTHERWISE = "set STILLFRAME_NEWER_QEMU to a qemu-system-x86_64 of at least version 9.0"
_WANTED = Wanted("a newer QEMU", f"or {_OTHERWISE}")
_WRAPPER = """\
#!/bin/sh
R={tree}
L=$R/usr/lib/{arch}:$R/lib/{arch}
export LD_LIBRARY_PATH="$L${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
export QEMU_MODULE_DIR="$R/usr/lib/{arch}/qemu"
exec "$R/usr/bin/qemu-system-x86_64" {firmware} "$@"
"""
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


def require_newer_qemu() -> str:
    """The program; skips the running test where there is none (a failure under CI)."""
    try:
        return newer_qemu()
    except HostError as error:
        pytest.skip(f"missing newer-qemu: {error}")


@cache
def newer_qemu() -> str:
    """A ``qemu-system-x86_64`` of at least version :data:`OLDEST`, as a path to execute.

    Raises:
        HostError: there is none, and none can be fetched.
    """
    named = os.environ.get("STILLFRAME_NEWER_QEMU")
    if named:
        if qemu_version(named) < OLDEST:
            raise HostError(f"STILLFRAME_NEWER_QEMU names {named}, which is not newer")
        return named
    with contextlib.suppress(HostError):
        if qemu_version(installed := qemu_binary()) >= OLDEST:
            return installed
    directory = cache_directory("newer-qemu")
    wrapper = directory / "qemu-system-x86_64"
    if not wrapper.exists():
        _fetch(directory, wrapper)
    qemu_version(str(wrapper))
    return str(wrapper)


@cache
def qemu_version(program: str) -> tuple[int, ...]:
    """What ``program --version`` says.

    Raises:
        HostError: it does not run.
    """
    said = _run([program, "--version"], ".")
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        raise HostError(f"{program} does not tell its version", why=said[:200])
    return tuple(int(number) for number in match.groups())


def _fetch(directory: Path, wrapper: Path) -> None:
    """Unpack beside, then rename: another test session may do the same."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HostError(f"there is no {tool} to fetch a newer QEMU", remedy=_OTHERWISE)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
        fresh = Path(scratch, "tree")
        for archive in download_backports(Path(scratch), _PACKAGE, *_MODULES):
            _run(["dpkg-deb", "-x", str(archive), str(fresh)], scratch)
        if not (fresh / "usr/bin/qemu-system-x86_64").exists():
            raise HostError(f"the fetched {_PACKAGE} holds no qemu-system-x86_64")
        tree = directory / f"tree-{os.getpid()}"
        fresh.rename(tree)
        places = [root / place for root in (tree, Path("/")) for place in _FIRMWARE]
        ready = Path(scratch, "wrapper")
        ready.write_text(
            _WRAPPER.format(
                tree=tree,
                arch=f"{platform.machine()}-linux-gnu",
                firmware=" ".join(f"-L {place}" for place in places if place.is_dir()),
            )
        )
        ready.chmod(0o755)
        ready.rename(wrapper)


def download_backports(scratch: Path, *packages: str) -> list[Path]:
    """Packages of the backports suite, and what they need that is not installed.

    apt resolves and checks signatures; its lists and its cache are private ones.
    """
    suite, sources = _backports()
    (scratch / "sources.list").write_text(sources)
    for place in ("state/lists/partial", "cache/archives/partial", "tree"):
        (scratch / place).mkdir(parents=True)
    options = {
        "Dir::State": scratch / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "",
        "APT::Keep-Downloaded-Packages": "true",
    }
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"], scratch)
    install = ["-y", "-d", "--no-install-recommends", "-t", suite, "install", *packages]
    _run([*apt, *install], scratch)
    return sorted((scratch / "cache/archives").glob("*.deb"))


def _backports() -> tuple[str, str]:
    """(the suite's name, a sources.list with it) from the mirror that apt is set up with."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    form = "$(REPO_URI)|$(CODENAME)|$(COMPONENT)|$(SIGNED_BY)"
    listing = _run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], ".")
    for line in listing.splitlines():
        mirror, name, component, key = line.split("|")
        if (name, component) == (codename, "main"):
            signed = f"[signed-by={key}] " if key.startswith("/") else ""
            suite = f"{codename}-backports"
            return suite, "".join(
                f"deb {signed}{mirror} {name} main\n" for name in (codename, suite)
            )
    raise HostError("apt knows no mirror for a newer QEMU", remedy=_OTHERWISE)


def _run(command: list[str], directory: Path | str) -> str:
    return run_apt(command, directory, _WANTED, timeout_s=_APT_TIMEOUT_S)
