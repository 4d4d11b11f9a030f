"""Let a VM go on after something failed while it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from stillframe.errors import MachineError, StillframeError
from stillframe.qmp.client import QmpClient
from stillframe.qmp.connection import Address

_PATIENCE_S = 10.0
_TRY_TIMEOUT_S = 2.0
_PAUSE_S = 0.05


def resume_at_all_costs(qmp: QmpClient, addresses: Iterable[Address]) -> None:
    """Send ``cont`` over the connection that we have, or over a new one.

    Raises:
        MachineError: nobody answered for ten seconds; the guest's state is unknown.
    """
    deadline = time.monotonic() + _PATIENCE_S
    places = tuple(dict.fromkeys(addresses))
    last: StillframeError | None = None
    while time.monotonic() < deadline:
        if qmp.alive:
            try:
                qmp.execute("cont", timeout_s=_TRY_TIMEOUT_S)
                return
            except MachineError as error:
                last = error
        for address in places:
            try:
                with QmpClient.connect(address, timeout_s=_TRY_TIMEOUT_S) as other:
                    other.execute("cont", timeout_s=_TRY_TIMEOUT_S)
                    return
            except StillframeError as error:
                last = last or error
        time.sleep(_PAUSE_S)
    raise MachineError(
        "the VM could not be continued",
        why=str(last),
        remedy="send it 'cont' over its monitor, or look whether it still runs",
        guest_state="unknown",
    )


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5): /proc/PID/stat, field 22).

    Raises:
        MachineError: it is gone.
    """
    fields = _stat(pid)
    if fields is None:
        raise MachineError(f"process {pid} is gone", guest_state="none")
    return int(fields[19])


def process_alive(pid: int, started: int) -> bool:
    """Whether the process that started then still runs, and is no zombie."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX" and int(fields[19]) == started


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
