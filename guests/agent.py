"""A minimal client of the QEMU guest agent, for tests that need the agent's own answer.

Independent of ``stillframe.disks.guest_agent``, so that tests do not check code against itself.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillframe.errors import MachineError

PORT_NAME = "org.qemu.guest_agent.0"
START_TIMEOUT_S = 120.0
_PING_S = 5.0


def agent_execute(
    path: Path, command: str, arguments: dict[str, object] | None = None, *, timeout_s: float = 60.0
) -> Any:
    """Connect to the agent's socket, send one command, and return its ``return`` value.

    The socket serves one client at a time: while another is connected, this waits.

    Raises:
        MachineError: no answer in time, or the agent answers with an error.
    """
    number = secrets.randbits(31)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout_s)
        try:
            link.connect(str(path))
            with link.makefile("rwb") as stream:

                def say(name: str, values: dict[str, object] | None) -> None:
                    request = {"execute": name} | ({"arguments": values} if values else {})
                    stream.write(json.dumps(request).encode() + b"\n")
                    stream.flush()

                # answers to earlier clients may come first (QEMU docs/interop/qemu-ga.rst)
                say("guest-sync", {"id": number})
                while _answer(stream.readline()).get("return") != number:
                    pass
                say(command, arguments)
                answer = _answer(stream.readline())
        except (OSError, ValueError) as error:
            raise MachineError(f"the guest agent {path} did not answer", why=str(error)) from error
    if "error" in answer:
        raise MachineError(
            f"the guest agent refused {command}", why=str(answer["error"].get("desc"))
        )
    return answer["return"]


def _answer(line: bytes) -> dict[str, Any]:
    message = json.loads(line or b"null")
    if not isinstance(message, dict):
        raise ValueError("the connection was closed")
    return message


def wait_agent(ping: Callable[[float], object], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the agent answers.

    Args:
        ping: sends guest-ping with the given timeout in seconds; raises MachineError.

    Raises:
        MachineError: it did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        asked = time.monotonic()
        with contextlib.suppress(MachineError):
            ping(_PING_S)
            return
        time.sleep(max(0.0, 0.1 - (time.monotonic() - asked)))
    raise MachineError(f"the guest's agent did not answer within {timeout_s:g} s")
