"""Continuing a VM after a failure while it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from stillframe.errors import MachineError, StillframeError
from stillframe.kernel.proc_maps import proc_error
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from stillframe.qmp.connection import Address

_PATIENCE_S = 10.0
_REFUSED_PATIENCE_S = 300.0
"""For a VM that answers but may not continue yet: a dump takes longer the bigger the RAM."""
_TRY_TIMEOUT_S = 2.0
_STOPPED_BY_OTHERS = ("paused", "prelaunch")
"""A paused guest that is reset is in ``prelaunch`` (QEMU ``system/runstate.c``)."""
_PAUSE_S = 0.05


def resume_at_all_costs(qmp: QmpClient, addresses: Iterable[Address]) -> None:
    """Send ``cont`` over the connection that we have, or over a new one.

    Only to a paused VM: one that stopped by itself (an I/O error, a panic) stays so, and one that
    was suspended is suspended again (QEMU >= 9.0, ``system/cpus.c``: vm_prepare_start).

    Raises:
        MachineError: the VM did not answer for ten seconds, or refused for five minutes; the
            guest's state is unknown.
    """
    began = time.monotonic()
    places = tuple(dict.fromkeys(addresses))
    last: StillframeError | None = None
    while time.monotonic() - began < _patience_s(last):
        if qmp.alive:
            try:
                _go_on(qmp)
                return
            except MachineError as error:
                last = error
        for address in places:
            try:
                with QmpClient.connect(address, timeout_s=_TRY_TIMEOUT_S) as other:
                    _go_on(other)
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


def _patience_s(last: StillframeError | None) -> float:
    return _REFUSED_PATIENCE_S if isinstance(last, QmpCommandError) else _PATIENCE_S


def _go_on(qmp: QmpClient) -> None:
    reply = qmp.execute("query-status", timeout_s=_TRY_TIMEOUT_S)
    if isinstance(reply, dict) and reply.get("status") in _STOPPED_BY_OTHERS:
        qmp.execute("cont", timeout_s=_TRY_TIMEOUT_S)


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc(5): /proc/PID/stat, field 22).

    Raises:
        MachineError: the process is gone. HostError: it cannot be examined.
    """
    try:
        return int(_stat(pid)[19])
    except OSError as error:
        raise proc_error(pid, "the state", error) from error


def process_alive(pid: int, started: int) -> bool:
    """Return whether the process that started then still runs, and is no zombie.

    If /proc cannot be read (no descriptor is free), take a process with that pid for the same one.
    """
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return _takes_signals(pid)
    return fields[0] not in "ZX" and int(fields[19]) == started


def process_state(pid: int) -> str:
    """Return a process's state in one letter (proc(5)); ``X`` if it is gone."""
    try:
        return _stat(pid)[0]
    except OSError:
        return "X"


def _takes_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
