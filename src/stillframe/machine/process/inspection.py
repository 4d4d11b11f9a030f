"""The evidence for the pre-flight, gathered once and quickly, without touching the guest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from stillframe.kernel.proc_maps import Vma, proc_error, read_maps
from stillframe.machine import Mode
from stillframe.machine.process.vm_info import VmInfo
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from stillframe.qmp.replies import as_map


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The VM as the pre-flight sees it.

    ``fd_targets``: what the VMM's descriptors point to, in ``/proc``'s words.
    ``ram_vmas``: the mappings of the blocks. Of QEMU only: ``devices``, QOM path to type, of the
    devices that a user asked for (not the machine's own); ``ram_flags``, per block, RAM_* flags.
    """

    mode: Mode
    info: VmInfo
    qmp: QmpClient
    status: str
    migration: Mapping[str, object]
    blocks: tuple[RamBlock, ...]
    ram_vmas: tuple[Vma, ...]
    fd_targets: frozenset[str]
    devices: dict[str, str] = {}
    ram_flags: dict[str, int] = {}


def gather(info: VmInfo, qmp: QmpClient, blocks: Sequence[RamBlock], mode: Mode) -> Inspection:
    """Gather the evidence once; skip whatever takes long if there are no ``blocks``.

    Raises:
        MachineError: the monitor or the process went away. HostError: not permitted.
    """
    return Inspection(
        mode=mode,
        info=info,
        qmp=qmp,
        status=str(as_map(qmp.execute("query-status")).get("status")),
        migration=as_map(qmp.execute("query-migrate")),
        blocks=tuple(blocks),
        ram_vmas=_ram_vmas(info.pid, blocks),
        fd_targets=fd_targets(info.pid) if blocks else frozenset(),
    )


def ask(
    qmp: QmpClient, command: str, arguments: Mapping[str, object] | None = None
) -> object | None:
    """Run a command that this VM may lack or refuse; return None then.

    Raises:
        MachineError: the monitor went away.
    """
    try:
        return qmp.execute(command, arguments)
    except QmpCommandError:
        return None


def _ram_vmas(pid: int, blocks: Sequence[RamBlock]) -> tuple[Vma, ...]:
    spans = [(block.hva, block.hva + block.max_length_bytes) for block in blocks]
    return tuple(
        vma
        for vma in (read_maps(pid).vmas if blocks else ())
        if any(vma.start < end and start < vma.end for start, end in spans)
    )


def fd_targets(pid: int) -> frozenset[str]:
    """Return what a process's descriptors point to.

    Raises:
        HostError: not permitted. MachineError: the process is gone.
    """
    targets: set[str] = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                targets.add(str(entry.readlink()))
            except FileNotFoundError:
                continue  # closed meanwhile
    except OSError as error:
        raise proc_error(pid, "the open files", error) from error
    return frozenset(targets)
