"""The QEMU system emulators that run on this host, as ``/proc`` and their command lines tell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stillframe.errors import StillframeError
from stillframe.machine.qemu.command_line import Chardev, CommandLine, parse_command_line
from stillframe.machine.qemu.sockets import unix_socket_path
from stillframe.qmp.client import QmpClient
from stillframe.qmp.connection import Address, has_client

_EMULATOR = re.compile(r"qemu-system-[\w-]+|qemu-kvm|kvm")
_PROBE_TIMEOUT_S = 0.5


class VmInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A running VM, seen from outside; nothing was asked of it unless ``version`` is set.

    ``started_s``: seconds since 1970. ``uid``: whose process it is. ``name``: from ``-name``, may
    be empty. ``version``: of QEMU, None when its monitor was not asked or did not answer.
    ``accelerator``: ``kvm``, ``tcg``, ...; ``ram_bytes``: main RAM as started.
    ``qmp_addresses``: unix paths (absolute, reachable from here) and (host, port) pairs.
    """

    pid: int
    started_s: float
    uid: int
    name: str
    executable: str
    argv: tuple[str, ...]
    accelerator: str
    ram_bytes: int
    qmp_addresses: tuple[Address, ...]
    version: str | None = None


def list_vms(*, ask_version: bool = False) -> list[VmInfo]:
    """All QEMU system emulators in ``/proc``, by pid. The guests are not touched.

    Args:
        ask_version: connect to each free monitor for a moment, to learn the version.
    """
    vms = [vm for pid in _pids() if (vm := read_vm(pid)) is not None]
    if ask_version:
        vms = [msgspec.structs.replace(vm, version=_asked_version(vm)) for vm in vms]
    return vms


def read_vm(pid: int, *, any_program: bool = False) -> VmInfo | None:
    """The VM that process ``pid`` is, or None: no such process, or no QEMU system emulator.

    Args:
        any_program: take the process for a VM whatever its program is called.
    """
    directory = Path(f"/proc/{pid}")
    try:
        argv = tuple(
            # A manifest holds text; a name that is none must not make a snapshot fail.
            word.decode(errors="backslashreplace")
            for word in (directory / "cmdline").read_bytes().split(b"\0")[:-1]
        )
        owner = directory.stat().st_uid
        started_s = _started_s(directory)
    except OSError:
        return None
    if not argv:
        return None  # a kernel thread, or a zombie
    try:
        executable = str((directory / "exe").readlink()).removesuffix(" (deleted)")
    except OSError:
        executable = ""  # somebody else's process
    names = (executable.rpartition("/")[2], argv[0].rpartition("/")[2])
    if not any_program and not any(_EMULATOR.fullmatch(name) for name in names):
        return None
    line = parse_command_line(argv)
    return VmInfo(
        pid=pid,
        started_s=started_s,
        uid=owner,
        name=line.name,
        executable=executable,
        argv=argv,
        accelerator=_accelerator(directory, line),
        ram_bytes=line.ram_bytes,
        qmp_addresses=tuple(
            address for monitor in line.monitors if (address := _reachable(directory, monitor))
        ),
    )


def _pids() -> Iterator[int]:
    yield from sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _started_s(directory: Path) -> float:
    fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    for line in Path("/proc/stat").read_bytes().splitlines():
        if line.startswith(b"btime "):
            return int(line.split()[1]) + since_boot_s
    return 0.0


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
    if not path:
        return None
    try:
        if not path.startswith("/"):
            path = f"{(directory / 'cwd').readlink()}/{path}"
        if not _same_files(directory):
            path = f"{directory}/root{path}"
    except OSError:
        return path if path.startswith("/") else None
    return os.path.normpath(path)


def _same_files(directory: Path) -> bool:
    """Whether the process sees the same file tree as we do."""
    return all(
        (directory / link).readlink() == Path("/proc/self", link).readlink()
        for link in ("ns/mnt", "root")
    )


def _asked_version(vm: VmInfo) -> str | None:
    for address in vm.qmp_addresses:
        if has_client(address):
            continue
        try:
            with QmpClient.connect(address, timeout_s=_PROBE_TIMEOUT_S) as qmp:
                return ".".join(str(number) for number in qmp.version)
        except StillframeError:
            continue
    return None
