"""A monitor of a domain beside libvirt's: no call of libvirt's for each command, no job lock.

Either the domain's own socket (``<qemu:arg value='-qmp'/>``), or from QEMU 11.1 on one that is made
while it runs, on a descriptor that is handed over. It deletes itself when our end is closed
(QEMU ``qapi/qom.json``: MonitorQMPProperties, close-action).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from stillframe.errors import StillframeError
from stillframe.qmp.client import QmpClient

_TIMEOUT_S = 2.0
"""For the greeting; none comes while somebody else is connected."""

Ask = Callable[[dict[str, Any], list[int] | None], Any]


def connect_own(paths: Sequence[str]) -> QmpClient | None:
    """The first of a domain's own monitors that lets us in. The guest is not touched."""
    for path in paths:
        with contextlib.suppress(StillframeError):
            return QmpClient.connect(path, timeout_s=_TIMEOUT_S)
    return None


def make_own(ask: Ask, failures: tuple[type[Exception], ...]) -> QmpClient | None:
    """A monitor made at run time, or None where this QEMU makes none. The guest is not touched.

    Args:
        ask: runs a command, with descriptors, on the monitor that is there.
        failures: what it raises.
    """
    name = f"stillframe-{os.getpid()}"
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            ask({"execute": "getfd", "arguments": {"fdname": name}}, [theirs.fileno()])
        except failures:
            ours.close()
            return None
    backend = {"addr": {"type": "fd", "data": {"str": name}}, "server": False}
    backend_of = {"id": name, "backend": {"type": "socket", "data": backend}}
    monitor = {"qom-type": "monitor-qmp", "id": f"{name}-monitor", "chardev": name}
    either: tuple[type[Exception], ...] = (*failures, StillframeError)
    with contextlib.suppress(*failures):
        ask({"execute": "chardev-add", "arguments": backend_of}, None)
        try:
            arguments = {**monitor, "close-action": "delete"}
            ask({"execute": "object-add", "arguments": arguments}, None)
            return QmpClient.over(ours, name, timeout_s=_TIMEOUT_S)
        except either:
            ask({"execute": "chardev-remove", "arguments": {"id": name}}, None)
    ours.close()
    return None
