"""The host's CPU, and what binds a VM to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from stillframe.model import HostCpu

_BINDING_BLOCKER = re.compile(r"invtsc flag|hv-passthrough|hv-no-nonarch-coresharing")
"""QEMU ``target/i386/kvm/kvm.c``: blockers for a CPU with features of this host alone."""
_BINDING_OPTION = re.compile(r"\bmigratable=(?:off|no|false)\b|\bhv[-_]passthrough\b")


def host_cpu() -> HostCpu:
    """Return the first CPU of ``/proc/cpuinfo``; what the file does not state is empty."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            break
        facts[name.strip()] = value.strip()
    return HostCpu(
        vendor=facts.get("vendor_id", ""),
        family=facts.get("cpu family", ""),
        model=facts.get("model", ""),
        name=facts.get("model name", ""),
        flags=facts.get("flags", ""),
    )


def cpu_ties(blockers: Iterable[object], argv: Sequence[str]) -> tuple[str, ...]:
    """Return what binds the guest to this very CPU: QEMU's blockers, options of its command
    line."""
    found = [str(blocker) for blocker in blockers if _BINDING_BLOCKER.search(str(blocker))]
    found += [word for word in argv if _BINDING_OPTION.search(word)]
    return tuple(found)


def difference(recorded: HostCpu, here: HostCpu) -> str | None:
    """Return what a guest bound to the recorded CPU would miss here, or None."""
    if (recorded.vendor, recorded.family, recorded.model) != (here.vendor, here.family, here.model):
        return f"that was {_called(recorded)}, this is {_called(here)}"
    missing = sorted(set(recorded.flags.split()) - set(here.flags.split()))
    if missing:
        return f"this {_called(here)} lacks {', '.join(missing)}"
    return None


def _called(cpu: HostCpu) -> str:
    return f"{cpu.name or 'an unknown CPU'} ({cpu.vendor} family {cpu.family} model {cpu.model})"
