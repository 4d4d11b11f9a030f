"""Remedies for a QEMU that did not start, by its own words (QEMU 7.2 to 10.2)."""

from __future__ import annotations

import re

from stillframe.restore.records import RestorePlan
from stillframe.restore.show import printable

_DISPLAY = re.compile(
    r"gtk init|cannot open display|could not initialize sdl|display '\w+' is not available"
    r"|opengl|\begl\b",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"unable to map backing store|insufficient (free )?host memory|cannot allocate memory"
    r"|failed to (resize|create) memfd|preallocat",
    re.IGNORECASE,
)


def remedy_for(words: str, plan: RestorePlan) -> str | None:
    """Return what to do about a VM that ended with these words; None if no remedy is known."""
    if "unsupported machine type" in words:
        return (
            f"the machine is {printable(plan.machine_type)}, recorded from "
            f"{printable(plan.recorded_program)}; name a QEMU that has it: --program QEMU"
        )
    if _DISPLAY.search(words):
        return "where there is no display to open a window on: restore it with -- -display none"
    if _MEMORY.search(words) and any("hugetlb" in word for word in plan.argv):
        return (
            "the huge pages do not suffice for both VMs: end the first one, add pages"
            " (/proc/sys/vm/nr_hugepages), or give its memory without hugetlb after --, as in"
            f" -- {_ordinary_memory(plan)}"
        )
    if "-tpmdev" in plan.argv and ("no monitor" in words or "tpm" in words.lower()):
        return "a swtpm serves one VM at a time: start another one, on a socket of its own"
    if "requires vnet_hdr" in words or "vnet_hdr=on" in words:
        return "its virtio card was on a tap: give -netdev tap,... with the same id after --"
    return None


def _ordinary_memory(plan: RestorePlan) -> str:
    for name, value in zip(plan.argv, plan.argv[1:], strict=False):
        found = re.search(r'(?:\bid=|"id":")([\w.-]+)', value)
        size = re.search(r'(?:\bsize=|"size":)([\w.]+)', value)
        if name == "-object" and "hugetlb" in value and found and size:
            share = ",share=on" if re.search(r'share=on|"share":true', value) else ""
            return f"-object memory-backend-memfd,id={found[1]},size={size[1]}{share}"
    return "-object memory-backend-memfd,id=ID,size=SIZE"
