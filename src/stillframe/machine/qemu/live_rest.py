"""Changes in a running QEMU that no option of a new command line expresses: reported by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillframe.machine.process.inspection import ask
from stillframe.machine.qemu.options import Option
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

THROTTLE_LIMITS = ("iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr")
"""The keys of ``query-block`` (QEMU qapi/block-core.json: BlockDeviceInfo)."""


def unsaid(
    qmp: QmpClient, line: Sequence[Option], *, nics: int, plugged_nics: int
) -> Iterator[str]:
    """Yield the differences.

    Args:
        line: the options at the start. nics: existing network cards; plugged_nics: those of
            ``-device`` and ``device_add``.

    Raises:
        MachineError: the monitor went away.
    """
    if not any(word in option.value for option in line for word in ("throttl", "iops", "bps")):
        for entry in map(as_map, as_list(ask(qmp, "query-block"))):
            limits = as_map(entry.get("inserted"))
            if any(limits.get(key) for key in THROTTLE_LIMITS):
                name = entry.get("device") or entry.get("qdev")
                yield f"disk {name} has I/O limits that were set later: they are not recorded"
    started = sum(_makes_nic(option) for option in line)
    if nics - plugged_nics < started:
        gone = started - nics + plugged_nics
        yield f"{gone} network card(s) of -nic were unplugged: they come back in a restored VM"
    slots = map(as_map, as_list(ask(qmp, "query-hotpluggable-cpus")))
    first = sum(str(slot.get("qom-path")).startswith("/machine/unattached/") for slot in slots)
    smp = next((o.fields().get("cpus", "") for o in reversed(line) if o.name == "smp"), "")
    if first and smp.isdigit() and first < int(smp):
        yield f"{int(smp) - first} processor(s) of -smp were unplugged: a restored VM has them"


def _makes_nic(option: Option) -> bool:
    kind = option.value.partition(",")[0]
    return (option.name == "nic" and kind != "none") or (option.name == "net" and kind == "nic")
