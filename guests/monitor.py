"""A minimal QMP client, for tests and benchmarks that need QEMU's own answer.

Independent of ``stillframe.qmp``, so that tests do not check code against itself.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from stillframe.errors import MachineError


def qmp_execute(
    path: Path, command: str, arguments: dict[str, object] | None = None, *, timeout_s: float = 60.0
) -> Any:
    """Connect, send one command, and return its ``return`` value. Events are skipped.

    The monitor serves one client at a time: while another is connected, this waits.

    Raises:
        MachineError: no answer in time, or QEMU answers with an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout_s)
        try:
            link.connect(str(path))
            with link.makefile("rwb") as stream:
                stream.readline()
                for name, values in (("qmp_capabilities", None), (command, arguments)):
                    request = {"execute": name} | ({"arguments": values} if values else {})
                    stream.write(json.dumps(request).encode() + b"\n")
                    stream.flush()
                    answer = _answer(stream.readline)
        except (OSError, ValueError) as error:
            raise MachineError(f"the monitor {path} did not answer", why=str(error)) from error
    if "error" in answer:
        raise MachineError(f"QEMU refused {command}", why=answer["error"].get("desc"))
    return answer["return"]


def _answer(readline: Any) -> dict[str, Any]:
    while True:
        message = json.loads(readline() or b"null")
        if not isinstance(message, dict):
            raise ValueError("the connection was closed")
        if "return" in message or "error" in message:
            return message
