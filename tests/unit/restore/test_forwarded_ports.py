"""Ports that move, as QEMU tells them; networks on which clones may meet."""

from __future__ import annotations

from typing import cast

import pytest

from stillframe.errors import DataError, MachineError
from stillframe.qmp.client import QmpClient
from stillframe.restore.forwarded_ports import parse_forward, with_ports
from stillframe.restore.networks import shared_networks
from stillframe.restore.option import split_options

USERNET = """Hub -1 (n0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]   8       127.0.0.1 45263       10.0.2.15    22     0     0
  TCP[ESTABLISHED]    9       127.0.0.1 45263       10.0.2.15    22     0     0
  UDP[HOST_FORWARD]   3               * 41317       10.0.2.15    53     0     0
Hub -1 (n1):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]   8               * 41111       10.0.2.16    22     0     0
"""


class Monitor:
    def execute(self, name: str, arguments: dict[str, str]) -> str:
        assert (name, arguments) == ("human-monitor-command", {"command-line": "info usernet"})
        return USERNET


QMP = cast(QmpClient, Monitor())


def test_the_ports_are_those_that_qemu_tells() -> None:
    texts = [("n1", "::2222-10.0.2.16:22"), ("n0", "udp::53-:53"), ("n0", "tcp:127.0.0.1:22-:22")]
    forwards = [parse_forward(network, text) for network, text in texts]
    assert all(forwards)
    seen = with_ports(QMP, [forward for forward in forwards if forward])
    assert [(one.source_port, one.port) for one in seen] == [
        (2222, 41111),
        (53, 41317),
        (22, 45263),
    ]
    assert [one.rule for one in seen] == [
        "tcp::0-10.0.2.16:22", "udp::0-:53", "tcp:127.0.0.1:0-:22",
    ]  # fmt: skip


def test_a_port_that_is_not_forwarded_is_an_error() -> None:
    missing = parse_forward("n0", "tcp::80-:80")
    assert missing is not None
    with pytest.raises(MachineError, match="does not forward tcp::0-:80"):
        with_ports(QMP, [missing])


@pytest.mark.parametrize("text", ["", "tcp::1", "unix:/tmp/x-:22", "sctp::1-:2", "tcp:[::1]:1-:2"])
def test_other_forms_do_not_move(text: str) -> None:
    assert parse_forward("n0", text) is None


def test_guests_may_meet_on_a_caller_s_own_network_only() -> None:
    words = (
        "-netdev user,id=u -netdev tap,id=t,script=no -netdev hubport,id=h,hubid=1000 -nic user"
        " -netdev tap,id=named,ifname=tap0 -netdev socket,id=s,listen=:1 -nic bridge,br=br0"
    )
    assert shared_networks(split_options(words.split(), DataError)) == ["named", "s", "bridge"]
