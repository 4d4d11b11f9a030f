"""VMs with a monitor for people only, and what people say to it."""

from __future__ import annotations

import socket
from pathlib import Path

from guests.qemu import GuestVm


class HumanGuestVm(GuestVm):
    """A guest whose monitor, at ``qmp_path``, is one for people."""

    def command_line(self) -> list[str]:
        return ["-monitor" if word == "-qmp" else word for word in super().command_line()]


def human(path: Path, *lines: str) -> str:
    """Say something to a human monitor, and wait for its prompt each time."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(60)
        monitor.connect(str(path))
        heard = ""
        for line in ("", *lines):
            if line:
                monitor.sendall(f"{line}\n".encode())
            said = ""
            while not said.endswith("(qemu) "):
                said += monitor.recv(65536).decode(errors="replace")
            heard += said
        return heard
