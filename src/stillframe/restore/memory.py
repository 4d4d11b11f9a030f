"""RAM of the new VM: the one place that says what backs it.

The stream fills RAM, so no file of the first VM is needed: QEMU would make it, or let it grow.
Sources: QEMU ``backends/hostmem-file.c``, ``hw/core/machine.c`` (create_default_memdev).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from stillframe.restore.builder import Builder
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_HUGETLBFS_MAGIC = 0x958458F6
_FILE_KEYS = ("mem-path", "pmem", "align", "discard-data", "readonly", "rom", "offset")


AT_ONCE = "it takes all of its memory at once, however much the file says that it is"


def all_at_once(builder: Builder, option: Option) -> None:
    """``-mem-prealloc``."""
    builder.risk(option, AT_ONCE)
    builder.keep(option)


def overcommit(builder: Builder, option: Option) -> None:
    """``-overcommit``."""
    value = OptionValue(option.value, "", json=False)
    if value.is_on("mem-lock"):
        builder.risk(option, AT_ONCE)
    builder.judge(option, value, plain=("mem-lock", "cpu-pm"))
    builder.keep(option)


def memory_file(builder: Builder, option: Option, value: OptionValue) -> None:
    """``memory-backend-file``: becomes as much nameless memory, under the same id."""
    path = builder.resolve(value.get("mem-path"))
    huge_bytes = huge_page_bytes(path)
    value.drop(*_FILE_KEYS)
    value.set("qom-type", "memory-backend-memfd")
    value.set("share", value.is_on("share"))
    reason = f"{path} is the first VM's own memory; nameless memory instead"
    if huge_bytes:
        value.set("hugetlb", True)
        value.set("hugetlbsize", huge_bytes)
        reason += f", on {huge_bytes >> 10} KiB pages as before"
    builder.set_value(option, value, reason)


def memory_path(builder: Builder, option: Option) -> None:
    """``-mem-path``: a directory on hugetlbfs stays (QEMU makes nameless files in it)."""
    path = builder.resolve(option.value)
    if huge_page_bytes(path) and Path(path).is_dir():
        builder.touch("file", "create", f"{path}/qemu_back_mem.*, nameless at once", option)
        builder.replace(option, option.with_value(path), "its directory, by its whole name")
    else:
        builder.drop(option, f"{path} is the first VM's own memory; nameless memory instead")


class _Statfs(ctypes.Structure):
    _fields_ = (
        ("f_type", ctypes.c_long),
        ("f_bsize", ctypes.c_long),
        ("rest", ctypes.c_long * 14),
    )


def huge_page_bytes(path: str) -> int:
    """Return the page size if a file or directory is on hugetlbfs (statfs(2)), else 0."""
    found = _Statfs()
    libc = ctypes.CDLL(None, use_errno=True)
    for place in (Path(path), Path(path).parent):
        if libc.statfs(os.fsencode(place), ctypes.byref(found)) == 0:
            return found.f_bsize if found.f_type == _HUGETLBFS_MAGIC else 0
    return 0
