"""Runs the program ``stillframe`` as an ordinary user, from a copy that this user may read.

The interpreter of the tests may lie in root's home, which nobody else may enter; then one of the
same version is looked for in the usual places.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import stillframe
from tests.support.probes import Probe

NOBODY = 65534
_MODULES = (
    "click",
    "rich",
    "markdown_it",
    "mdurl",
    "pygments",
    "backports.zstd",
    "blake3",
    "msgspec",
    "unicorn",
    "typing_extensions",
)
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


@cache
def can_become_nobody() -> Probe:
    """Root, ``setpriv``, and an interpreter that others may run."""
    if os.geteuid() != 0:
        return Probe("root", "only root can become another user")
    if shutil.which("setpriv") is None:
        return Probe("setpriv", "no program setpriv")
    if _interpreter() is None:
        return Probe("python", "no interpreter of this version that others may run")
    return Probe("root")


@cache
def _interpreter() -> str | None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        # By way of env: setpriv itself still has root's rights when it runs a program.
        done = subprocess.run(
            [*AS_NOBODY, "env", candidate, "-I", "-c", ""],
            capture_output=True,
            cwd="/",
            check=False,
        )
        if done.returncode == 0:
            return candidate
    return None


def interpreter_for_all() -> str:
    """A Python of this version that every user may run; see ``can_become_nobody``."""
    can_become_nobody().require()
    return str(_interpreter())


class OrdinaryUser:
    """A user without rights, with a directory and a copy of Stillframe of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o755)
        self.modules = directory / "modules"
        self.home = directory / "home"
        self.modules.mkdir()
        self.home.mkdir()
        os.chown(self.home, NOBODY, NOBODY)
        shutil.copytree(
            Path(stillframe.__file__).parent,
            self.modules / "stillframe",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in _MODULES:
            _copy_module(name, self.modules)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(self.modules),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home),
            "LC_ALL": "C.UTF-8",
        }

    def command(self, *words: object) -> list[str]:
        """The command that runs stillframe as that user."""
        return [*AS_NOBODY, interpreter_for_all(), "-m", "stillframe", *map(str, words)]

    def run(self, *words: object) -> subprocess.CompletedProcess[bytes]:
        """Run stillframe to its end."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )


def _copy_module(name: str, target: Path) -> None:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return
    origin = Path(found.origin)
    if found.submodule_search_locations is None:
        shutil.copy(origin, target)
        return
    place = target.joinpath(*name.split("."))
    place.parent.mkdir(exist_ok=True)
    shutil.copytree(origin.parent, place, ignore=shutil.ignore_patterns("__pycache__", "*.a"))


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[OrdinaryUser]:
    """Skips where there can be none."""
    can_become_nobody().require()
    # Not below pytest's own directories: each run closes them to others anew.
    with tempfile.TemporaryDirectory(prefix="nobody-") as directory:
        yield OrdinaryUser(Path(directory))
