"""The channel to a VM's guest agent: where it is, and how commands and answers travel.

A plain QEMU has a character device for it, listening on a socket that serves one client at a time.
For its domains libvirt holds that socket itself and passes commands on (virDomainQemuAgentCommand,
through ``machine.libvirt.bridge``). Sources: QEMU ``docs/interop/qemu-ga.rst``
(guest-sync-delimited), libvirt ``include/libvirt/libvirt-qemu.h``.
"""

from __future__ import annotations

import json
import math
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from stillframe.errors import BusyError, MachineError, RefusedError
from stillframe.machine.process.inspection import ask
from stillframe.machine.process.vm_info import reachable_path
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import Command, QmpCommandError
from stillframe.qmp.replies import as_list, as_map

START_REMEDY = "start qemu-guest-agent in the guest, or take it without --quiesce"
THAW = "guest-fsfreeze-thaw"
_PORT_NAME = "org.qemu.guest_agent.0"
_PARENTS = ("/machine/peripheral", "/machine/peripheral-anon")
_BY_LIBVIRT = "stillframe-agent"
_THAW_S = 30
_BRIDGE_S = 5.0
_LINE_BYTES = 1 << 20
"""No answer to our commands is as long; a guest must not make us buffer more."""


class AgentPlace(msgspec.Struct, frozen=True):
    """The place of a guest agent. ``path``: its socket; empty if libvirt passes commands on."""

    path: str = ""

    @property
    def thaw_command(self) -> Command | None:
        """The command on the VM's monitor that makes libvirt thaw the guest; None if the path is
        known."""
        if self.path:
            return None
        return _BY_LIBVIRT, {"request": {"execute": THAW}, "seconds": _THAW_S}


def is_thaw(command: Command) -> bool:
    """Return whether a command is an :attr:`AgentPlace.thaw_command`."""
    return command[0] == _BY_LIBVIRT


def find_agent(qmp: QmpClient, pid: int, managed_by: str = "") -> AgentPlace:
    """Find the VM's guest agent. The guest is not touched.

    Args:
        managed_by: ``libvirt``, if the VM is a domain; then ``qmp`` is a bridge to it.

    Raises:
        RefusedError: the VM has no channel for an agent, or one that we cannot connect to.
        MachineError: the monitor went away.
    """
    chardev = _agent_chardev(qmp)
    if chardev is None:
        raise RefusedError(
            "no-guest-agent",
            why=f"the VM has no virtserialport named {_PORT_NAME}",
            remedy="start the VM with one, or take it without --quiesce",
        )
    if managed_by == "libvirt":
        return AgentPlace()
    for entry in map(as_map, as_list(qmp.execute("query-chardev"))):
        if entry.get("label") != chardev:
            continue
        words = str(entry.get("filename")).removeprefix("disconnected:")
        kind, _, rest = words.partition(":")
        path = rest.split(",")[0]
        reachable = reachable_path(Path(f"/proc/{pid}"), path)
        if kind == "unix" and "server" in rest and reachable is not None:
            return AgentPlace(reachable)
        raise RefusedError(
            "guest-agent-busy" if kind == "unix" else "guest-agent-elsewhere",
            why=f"its channel is {words}, which nobody else can connect to",
            remedy="give it a listening unix socket, or take it without --quiesce",
        )
    raise RefusedError("no-guest-agent", why=f"there is no chardev {chardev}", remedy=START_REMEDY)


def _agent_chardev(qmp: QmpClient) -> str | None:
    for parent in _PARENTS:
        for item in map(as_map, as_list(ask(qmp, "qom-list", {"path": parent}))):
            if item.get("type") != "child<virtserialport>":
                continue
            path = f"{parent}/{item.get('name')}"
            if ask(qmp, "qom-get", {"path": path, "property": "name"}) == _PORT_NAME:
                return str(ask(qmp, "qom-get", {"path": path, "property": "chardev"}))
    return None


class AgentLink(Protocol):
    """A connection to a responsive agent."""

    def ask(self, request: Mapping[str, object], answer_s: float) -> Mapping[str, object]:
        """Return the agent's reply, with ``return`` or ``error``.

        Raises:
            OSError, EOFError, ValueError: there is none (TimeoutError: none in time).
        """

    def close(self) -> None:
        """Disconnect; never raises."""


def open_agent(place: AgentPlace, qmp: QmpClient, answer_s: float) -> AgentLink:
    """Connect to an agent, and make sure that it answers.

    Args:
        qmp: the VM's monitor. answer_s: how long the agent may take.

    Raises:
        RefusedError: the agent does not answer in time. BusyError: another client holds it.
    """
    if not place.path:
        return _DomainLink(qmp, answer_s)
    return _SocketLink(place.path, answer_s)


def _silent(where: str, why: str, remedy: str = START_REMEDY) -> RefusedError:
    return RefusedError("guest-agent-silent", why=f"the guest agent{where} {why}", remedy=remedy)


class _SocketLink:
    """The link over the character device's own socket."""

    def __init__(self, path: str, answer_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._rest = b""
        self._is_owed = False
        """Whether an answer that was not waited for may still come."""
        other = "end whoever else is connected to it"
        try:
            self._socket.settimeout(answer_s)
            self._socket.connect(path)
            self._synchronize(answer_s)
        except TimeoutError as error:
            self.close()
            raise _silent(
                f" at {path}",
                f"does not answer within {answer_s:g} s",
                f"{START_REMEDY}; or {other}",
            ) from error
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise BusyError(
                f"the guest agent at {path} cannot be asked",
                why=str(error),
                remedy=other,
                guest_state="running",
            ) from error

    def _synchronize(self, answer_s: float) -> None:
        """Discard what an earlier client left unfinished."""
        number, mark = _mark()
        self._socket.sendall(mark)
        self._skip_to(number, time.monotonic() + answer_s)

    def _skip_to(self, number: int, deadline_s: float) -> None:
        while self._answer(deadline_s).get("return") != number:
            pass

    def ask(self, request: Mapping[str, object], answer_s: float) -> Mapping[str, object]:
        text = json.dumps(request).encode() + b"\n"
        deadline_s = time.monotonic() + answer_s
        was_owed, self._is_owed = self._is_owed, True
        number, mark = _mark()
        # Together: an agent that only answers late must get the request all the same.
        self._socket.sendall(mark + text if was_owed else text)
        if was_owed:
            self._skip_to(number, deadline_s)
        answer = self._answer(deadline_s)
        self._is_owed = False
        return answer

    def _answer(self, deadline_s: float) -> dict[str, object]:
        while b"\n" not in self._rest:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no answer in time")
            self._socket.settimeout(left_s)
            part = self._socket.recv(65536)
            if not part:
                raise EOFError("the connection was closed")
            self._rest += part
            if len(self._rest) > _LINE_BYTES:
                raise ValueError("its answer does not end")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            reply = json.loads(line.rpartition(b"\xff")[2])
        except RecursionError as error:
            raise ValueError("its answer is nested too deeply") from error
        return reply if isinstance(reply, dict) else {}

    def close(self) -> None:
        self._socket.close()


def _mark() -> tuple[int, bytes]:
    """Return a number, and the request that has the agent say it."""
    number = secrets.randbits(31)
    ask_for = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    return number, b"\xff" + json.dumps(ask_for).encode() + b"\n"


class _DomainLink:
    """The link through libvirt, which synchronizes with the agent before each command."""

    def __init__(self, qmp: QmpClient, answer_s: float) -> None:
        self._qmp = qmp
        try:
            reply = self.ask({"execute": "guest-ping"}, answer_s)
        except (OSError, MachineError) as error:
            why = (error.why or error) if isinstance(error, MachineError) else error
            raise _silent("", f"does not answer: {why}") from error
        if "error" in reply:  # libvirt's own, such as "not connected"
            raise _silent("", f"does not answer: {as_map(reply['error']).get('desc')}")

    def ask(self, request: Mapping[str, object], answer_s: float) -> Mapping[str, object]:
        seconds = math.ceil(answer_s)
        try:
            reply = self._qmp.execute(
                _BY_LIBVIRT,
                {"request": dict(request), "seconds": seconds},
                timeout_s=seconds + _BRIDGE_S,
            )
        except QmpCommandError as error:
            if error.error_class == "AgentUnresponsive":
                raise TimeoutError(error.description) from error
            return {"error": {"desc": error.description}}
        return as_map(reply)

    def close(self) -> None:
        """Do nothing: the monitor is not ours to close."""
