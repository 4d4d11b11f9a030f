"""The QEMU system emulators that run on this host, as ``/proc`` and their command lines tell."""

from __future__ import annotations

import re
from pathlib import Path

from stillframe.machine.outside.sockets import unix_socket_path
from stillframe.machine.outside.vm_info import VmInfo, process_facts, reachable_path
from stillframe.machine.qemu.command_line import Chardev, CommandLine, parse_command_line
from stillframe.qmp.connection import Address

_EMULATOR = re.compile(r"qemu-system-[\w-]+|qemu-kvm|kvm")


def read_qemu(pid: int, *, any_program: bool = False) -> VmInfo | None:
    """The VM that process ``pid`` is, or None: no such process, or no QEMU system emulator.

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
    line = parse_command_line(process.argv)
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
            address for monitor in line.monitors if (address := _reachable(directory, monitor))
        ),
    )


def _accelerator(directory: Path, line: CommandLine) -> str:
    """What runs the guest: certain where the descriptors may be read, else the first asked for."""
    try:
        targets = [str(entry.readlink()) for entry in (directory / "fd").iterdir()]
    except OSError:
        return line.accelerators[0]
    if "anon_inode:kvm-vm" in targets:
        return "kvm"
    return next((name for name in line.accelerators if name != "kvm"), "tcg")


def _reachable(directory: Path, monitor: Chardev) -> Address | None:
    """The monitor's address as we can use it: absolute, and through the VM's own root if needed."""
    if monitor.host_port is not None:
        return monitor.host_port
    path = monitor.path
    if monitor.fd is not None:
        path = unix_socket_path(directory, monitor.fd)
    return reachable_path(directory, path) if path else None
