"""The host's ports that user networks forward to the guest: the first VM has its own, so each clone
gets free ones, which the kernel chooses (port 0) and QEMU reports.

Sources: QEMU ``net/slirp.c`` (slirp_hostfwd), HMP ``info usernet``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from stillframe.errors import MachineError
from stillframe.qmp.client import QmpClient

_FORWARD = re.compile(r"(tcp|udp|):([\w.-]*):(\d{1,5})-([\d.]*):(\d{1,5})")
_ROW = re.compile(r"\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s", re.ASCII)
_NETWORK = re.compile(r"Hub -?\d+ \((.*)\):")


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A forwarded port. ``network``: the id of its ``-netdev``, empty if it has none.
    ``address``: on this host, empty for all. ``port``: on this host; ``source_port``: that of the
    first VM. ``guest_address``: empty for the network's first one."""

    network: str
    protocol: str
    address: str
    source_port: int
    guest_address: str
    guest_port: int
    port: int = 0

    @property
    def rule(self) -> str:
        """The rule as QEMU takes it, with any free port."""
        host = f"{self.protocol}:{self.address}:0"
        return f"{host}-{self.guest_address}:{self.guest_port}"


def parse_forward(network: str, text: str) -> Forward | None:
    """Parse a value of ``hostfwd=``; None for an unknown form, such as a Unix socket's."""
    found = _FORWARD.fullmatch(text)
    if found is None:
        return None
    protocol, address, port, guest_address, guest_port = found.groups()
    return Forward(
        network=network,
        protocol=protocol or "tcp",
        address=address,
        source_port=int(port),
        guest_address=guest_address,
        guest_port=int(guest_port),
    )


def with_ports(qmp: QmpClient, forwards: Sequence[Forward]) -> tuple[Forward, ...]:
    """Return the forwards with the ports that a new VM's QEMU listens on.

    Raises:
        MachineError: QEMU does not tell, or does not forward one.
    """
    if not forwards:
        return ()
    text = qmp.execute("human-monitor-command", {"command-line": "info usernet"})
    rows, network = [], ""
    for line in str(text).splitlines():
        if named := _NETWORK.match(line):
            network = named[1]
        elif row := _ROW.match(line + " "):
            rows.append((network, *row.groups()))
    return tuple(_found(forward, rows) for forward in forwards)


def _found(forward: Forward, rows: list[tuple[str, ...]]) -> Forward:
    for row in rows:
        network, protocol, address, port, guest_address, guest_port = row
        if (
            (forward.network, forward.protocol.upper()) in ((network, protocol), ("", protocol))
            and forward.address in ("", address, "0.0.0.0", "localhost")
            and forward.guest_address in ("", guest_address)
            and forward.guest_port == int(guest_port)
        ):
            rows.remove(row)
            return msgspec.structs.replace(forward, port=int(port))
    raise MachineError(
        f"the clone does not forward {forward.rule}",
        why="its QEMU does not list that port",
        remedy="give its network yourself after --",
        guest_state="none",
    )
