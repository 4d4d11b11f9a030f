"""A session libvirt of another user, in a private XDG_RUNTIME_DIR: the distribution's, or Debian's
backports one, which is fetched and unpacked (not installed), as ``newer_qemu`` does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest

from guests.build import cache_directory
from guests.domain import virsh
from stillframe.errors import HostError
from tests.support.newer_qemu import download_backports

_PACKAGES = ("libvirt0", "libvirt-common", "libvirt-daemon", "libvirt-daemon-common",
             "libvirt-daemon-driver-qemu", "libvirt-daemon-driver-storage", "libvirt-daemon-log",
             )  # fmt: skip
_NOBODY = 65534
_START_S = 120.0


class SessionLibvirt:
    """libvirtd as user nobody. ``uri``: how root gets to it. ``directory``: nobody's own.

    Args:
        newer: the backports one, at least 11.0.
    """

    uid = _NOBODY

    def __init__(self, *, newer: bool = False) -> None:
        if os.geteuid() != 0:
            pytest.skip("missing root: libvirtd is started as another user")
        # Where nobody gets to; root's home and cache are not.
        self.directory = Path(tempfile.mkdtemp(prefix="sf-session-", dir="/var/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        socket = self.directory / "run/libvirt/libvirt-sock"
        self.run = self.directory / "run/libvirt/qemu/run"
        self.uri = f"qemu+unix:///session?socket={socket}"
        try:
            self.directory.chmod(0o711)
            for name in ("run", "config", "cache", "home", "work"):
                (self.directory / name).mkdir()
                os.chown(self.directory / name, _NOBODY, _NOBODY)
            settings = self.directory / "config/libvirt/qemu.conf"
            settings.parent.mkdir()
            os.chown(settings.parent, _NOBODY, _NOBODY)
            settings.write_text('stdio_handler = "file"\n')  # else virtlogd must run, too
            self._start(_unpacked(self.directory / "tree") if newer else None)
        except BaseException:
            self.close()
            raise

    @property
    def work(self) -> Path:
        """For disks and snapshots."""
        return self.directory / "work"

    def _start(self, tree: Path | None) -> None:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.directory / "home"),
            "XDG_RUNTIME_DIR": str(self.directory / "run"),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
        }
        program = shutil.which("libvirtd", path="/usr/sbin:/usr/bin") or "libvirtd"
        if tree is not None:
            program = str(tree / "usr/sbin/libvirtd")
            libraries = next(tree.glob("usr/lib/*/libvirt.so.0")).parent
            environment |= {
                "LD_LIBRARY_PATH": str(libraries),
                "LIBVIRT_DRIVER_DIR": str(libraries / "libvirt/connection-driver"),
                "LIBVIRT_STORAGE_BACKEND_DIR": str(libraries / "libvirt/storage-backend"),
            }
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", program],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        deadline = time.monotonic() + _START_S
        while True:
            try:
                virsh("version", uri=self.uri)
                return
            except subprocess.CalledProcessError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    why = (self.directory / "log").read_text()[-500:]
                    raise HostError("the session libvirtd does not start", why=why) from error
            time.sleep(0.1)

    def close(self) -> None:
        """End it and all of its domains, and remove its files."""
        for file in self.run.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, 9)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _unpacked(tree: Path) -> Path:
    """The newer libvirt; its packages are kept in the cache."""
    try:
        cache = cache_directory("newer-libvirt")
        if not list(cache.glob("*.deb")):
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
                for archive in download_backports(Path(scratch), *_PACKAGES):
                    if archive.name.startswith(tuple(f"{name}_" for name in _PACKAGES)):
                        archive.rename(cache / archive.name)
        for archive in cache.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive, tree], check=True)
        tree.chmod(0o755)
    except (HostError, OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"missing newer-libvirt: {error}")
    return tree
