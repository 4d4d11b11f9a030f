"""The QEMU system emulators that run on this host, from ``/proc`` and their command lines."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from stillframe.errors import StillframeError
from stillframe.machine.process.sockets import unix_socket_path
from stillframe.machine.process.vm_info import VmInfo, process_facts, reachable_path
from stillframe.machine.qemu.command_line import Chardev, CommandLine, parse_command_line
from stillframe.machine.qemu.config_file import Expansion
from stillframe.machine.qemu.options import split, words
from stillframe.machine.qemu.start_directory import chroots, start_directory
from stillframe.qmp.connection import Address

_EMULATOR = re.compile(r"qemu-system-[\w-]+|qemu-kvm|kvm")


def read_qemu(pid: int, *, any_program: bool = False) -> VmInfo | None:
    """Return the VM that process ``pid`` is, or None: no such process, or no QEMU system emulator.

    Args:
        any_program: take the process for a VM whatever its program is called.
    """
    process = process_facts(pid)
    if process is None:
        return None
    names = (process.executable.rpartition("/")[2], process.argv[0].rpartition("/")[2])
    if not any_program and not any(_EMULATOR.fullmatch(name) for name in names):
        return None
    directory = process.directory
    start, argv = _expanded(pid, process.argv)
    line = parse_command_line(argv)
    return VmInfo(
        pid=pid,
        started_s=process.started_s,
        uid=process.uid,
        name=line.name,
        executable=process.executable,
        argv=process.argv,
        accelerator=_accelerator(directory, line),
        ram_bytes=line.ram_bytes,
        qmp_addresses=tuple(
            address
            for monitor in line.monitors
            if (address := _reachable(directory, monitor, start, argv))
        ),
    )


def human_monitors(info: VmInfo) -> tuple[str, ...]:
    """Return the unix sockets of a QEMU's human monitors, absolute and reachable from here."""
    start, argv = _expanded(info.pid, info.argv)
    directory = Path(f"/proc/{info.pid}")
    found = (
        _reachable(directory, monitor, start, argv)
        for monitor in parse_command_line(argv).human_monitors
    )
    return tuple(address for address in found if isinstance(address, str))


def _expanded(pid: int, argv: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """Return where it was started, and its command line with what ``-readconfig`` adds."""
    start = _started_in(pid, argv)
    if any(word.lstrip("-") == "readconfig" for word in argv):
        argv = (argv[0], *words(Expansion(start).expand(split(argv))))
    return start, argv


def _accelerator(directory: Path, line: CommandLine) -> str:
    """Return what runs the guest: certain if we may read the descriptors, else the first choice."""
    try:
        targets = [str(entry.readlink()) for entry in (directory / "fd").iterdir()]
    except OSError:
        return line.accelerators[0]
    if "anon_inode:kvm-vm" in targets:
        return "kvm"
    return next((name for name in line.accelerators if name != "kvm"), "tcg")


def _started_in(pid: int, argv: Sequence[str]) -> Path:
    try:
        return start_directory(pid, argv)
    except (OSError, StillframeError):
        return Path("/")  # another user's process, or gone


def _reachable(
    directory: Path, monitor: Chardev, start: Path, argv: Sequence[str]
) -> Address | None:
    """Return the monitor's address as we can use it: absolute, and through the VM's own root if
    needed."""
    if monitor.host_port is not None:
        return monitor.host_port
    path = monitor.path
    if monitor.fd is not None:
        path = unix_socket_path(directory, monitor.fd)
    if not path:
        return None
    path = str(start / path)
    # QEMU bound it before it entered its own -chroot.
    return os.path.normpath(path) if chroots(argv) else reachable_path(directory, path)
