"""The beginning of a QMP connection: the greeting, and the capabilities that we enable (QEMU
``docs/interop/qmp-spec.rst``, capabilities negotiation)."""

from __future__ import annotations

import time
from collections.abc import Mapping

from stillframe.qmp.command import command_body
from stillframe.qmp.connection import Address, greeting_error, no_qmp_error
from stillframe.qmp.framing import FramingError
from stillframe.qmp.link import Link, Message
from stillframe.qmp.replies import as_int, as_map

_NEGOTIATION_ID = "stillframe-negotiation"


def negotiate(link: Link, address: Address, timeout_s: float) -> Mapping[str, object]:
    """Read the greeting and enter command mode; return the greeting.

    Args:
        address: how errors name the monitor.

    Raises:
        BusyError: another client holds the monitor. MachineError: no answer, or no QMP.
    """
    deadline_s = time.monotonic() + timeout_s
    greeting: Mapping[str, object] = {}
    try:
        greeting = _read_greeting(link, address, deadline_s)
        link.send(_request(greeting), deadline_s)
        if "return" not in _first_answer(link, deadline_s):
            raise no_qmp_error(address)
    except FramingError as error:
        raise no_qmp_error(address) from error
    except (OSError, EOFError) as error:
        raise greeting_error(address, error, timeout_s, greeted=bool(greeting)) from error
    return greeting


def version_of(greeting: Mapping[str, object]) -> tuple[int, int, int]:
    """Return the VMM's version: (major, minor, micro)."""
    numbers = as_map(as_map(greeting.get("version")).get("qemu"))
    major, minor, micro = (as_int(numbers.get(k)) for k in ("major", "minor", "micro"))
    return (major, minor, micro)


def _read_greeting(link: Link, address: Address, deadline_s: float) -> Mapping[str, object]:
    """Return the greeting. Output for an earlier client may come first: QEMU keeps what that
    client's socket did not take (``monitor/monitor.c``: monitor_flush_locked)."""
    while True:
        for message in link.receive(deadline_s):
            greeting = message.get("QMP")
            if isinstance(greeting, Mapping):
                return greeting
            if not message.keys() & {"event", "return", "error"}:
                raise no_qmp_error(address)


def _first_answer(link: Link, deadline_s: float) -> Message:
    """Return the answer to the negotiation. An event may come first, or QEMU's answer to the last
    input of an earlier client, such as half a command."""
    while True:
        for message in link.receive(deadline_s):
            if message.get("id") == _NEGOTIATION_ID:
                return message


def _request(greeting: Mapping[str, object]) -> bytes:
    """Return the negotiation command. With out-of-band commands, QEMU reads the next command while
    one runs."""
    offered = greeting.get("capabilities")
    oob = isinstance(offered, list) and "oob" in offered
    arguments = {"enable": ["oob"]} if oob else None
    body = command_body("qmp_capabilities", arguments)
    return body + b',"id":"%s"}\n' % _NEGOTIATION_ID.encode()
