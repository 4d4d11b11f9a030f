"""A process's memory cgroups, v1 and v2: how much can still be charged, and how much is in swap.

Source: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from stillframe.kernel.proc_fields import read_fields

_PROC = Path("/proc")
NAMES = {
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    "cgroup2": ("memory.max", "memory.current", ""),
}
"""By file system type: limit, usage, and the prefix of names in ``memory.stat``."""


class MemoryCgroup(NamedTuple):
    """A memory cgroup. ``kind``: its file system's type."""

    kind: str
    directory: Path

    def room_bytes(self) -> int | None:
        """Return how much can still be charged up to the limit, with the page cache dropped; at
        least 0. None: there is no limit."""
        limit_name, usage_name, prefix = NAMES[self.kind]
        try:
            limit = (self.directory / limit_name).read_text().strip()
            usage_bytes = int((self.directory / usage_name).read_text())
        except (OSError, ValueError):
            return None  # the root
        if limit == "max":
            return None
        stat = read_fields(self.directory / "memory.stat", " ")
        cached_bytes = sum(stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
        return max(0, int(limit) - usage_bytes + cached_bytes)

    def swapped_bytes(self) -> int:
        """Return how much of it is in swap; 0 if that is not accounted, as in the root."""
        if self.kind == "cgroup":
            return read_fields(self.directory / "memory.stat", " ").get("total_swap", 0)
        try:
            return int((self.directory / "memory.swap.current").read_text())
        except (OSError, ValueError):
            return 0


def memory_cgroups(process: int | str) -> Iterator[MemoryCgroup]:
    """Yield the memory cgroups of a process (a pid, or ``self``) and those that contain them,
    innermost first, as far as they are visible; none if ``/proc`` does not tell."""
    mounts = memory_mounts()
    try:
        lines = (_PROC / str(process) / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, controllers, name = line.split(":", 2)
        kind = "cgroup2" if controllers == "" else "cgroup"
        if kind not in mounts or not (kind == "cgroup2" or "memory" in controllers.split(",")):
            continue
        root, mount = mounts[kind]
        path = PurePosixPath(name)
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        directory = mount / inside
        for place in (directory, *directory.parents):
            yield MemoryCgroup(kind, place)
            if place == mount:
                break


def memory_mounts() -> dict[str, tuple[str, Path]]:
    """Return which cgroup is mounted where, by file system type (proc(5): mountinfo)."""
    mounts: dict[str, tuple[str, Path]] = {}
    try:
        lines = (_PROC / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        left, _, right = line.partition(" - ")
        kind, _source, options = right.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            _id, _parent, _device, root, place, *_rest = left.split(" ")
            mounts.setdefault(kind, (root, Path(place)))
    return mounts
