"""A domain's monitor beside libvirt's, which avoids a libvirt call and its job lock for each
command.

It is either the domain's own socket (``<qemu:arg value='-qmp'/>``) or, from QEMU 11.1 on, one made
at run time on a descriptor that we pass. The latter deletes itself when we close our end (QEMU
``qapi/qom.json``: MonitorQMPProperties, close-action).
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
"""For the greeting; none comes while another client is connected."""

Ask = Callable[[dict[str, Any], list[int] | None], Any]


def connect_own(paths: Sequence[str]) -> QmpClient | None:
    """Connect to the first of a domain's own monitors that accepts us. The guest is not touched."""
    for path in paths:
        with contextlib.suppress(StillframeError):
            return QmpClient.connect(path, timeout_s=_TIMEOUT_S)
    return None


def make_own(ask: Ask, failures: tuple[type[Exception], ...]) -> QmpClient | None:
    """Make a monitor at run time; return None if this QEMU cannot. The guest is not touched.

    Args:
        ask: runs a command, with descriptors, on the existing monitor.
        failures: the exceptions that ``ask`` raises.
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
        try:
            ask({"execute": "chardev-add", "arguments": backend_of}, None)
        except failures:
            ask({"execute": "closefd", "arguments": {"fdname": name}}, None)
            raise
        try:
            arguments = {**monitor, "close-action": "delete"}
            ask({"execute": "object-add", "arguments": arguments}, None)
            return QmpClient.over(ours, name, timeout_s=_TIMEOUT_S)
        except either:
            ask({"execute": "chardev-remove", "arguments": {"id": name}}, None)
    ours.close()
    return None
