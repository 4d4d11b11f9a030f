"""A memory cgroup of a test's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stillframe.kernel.memory_cgroups import NAMES, memory_cgroups, memory_mounts
from tests.support.waiting import wait_until


class MemoryCgroup:
    """A cgroup of our own, of either version."""

    def __init__(self) -> None:
        mounts = memory_mounts()
        v1 = "cgroup" in mounts
        if not mounts:
            pytest.skip("missing memory-cgroup: none is mounted")
        self.limit_name, self.usage_name, _ = NAMES["cgroup" if v1 else "cgroup2"]
        mount = mounts["cgroup" if v1 else "cgroup2"][1]
        self.path = mount / f"stillframe-test-{os.getpid()}"
        try:
            self.path.mkdir()
        except OSError as error:
            pytest.skip(f"missing memory-cgroup: {error.strerror}")
        if not (self.path / self.limit_name).exists():
            self.path.rmdir()
            pytest.skip("missing memory-cgroup: the controller is not delegated")

    def add(self, pid: int | str) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """We are in it, and what is started inside stays there."""
        own = next(memory_cgroups("self")).directory
        self.add("0")
        try:
            yield
        finally:
            (own / "cgroup.procs").write_text("0")

    def leave(self, room_bytes: int) -> None:
        """Set the limit so that this much is left."""
        usage = int((self.path / self.usage_name).read_text())
        (self.path / self.limit_name).write_text(str(usage + room_bytes))

    def remove(self) -> None:
        """Once what was killed in it has left it."""

        def is_gone() -> bool:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return not self.path.exists()

        wait_until(is_gone)
