"""What a running VM's process shows of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stillframe.errors import StillframeError, host_error
from stillframe.qmp.client import QmpClient
from stillframe.qmp.connection import Address, has_client

_PROBE_TIMEOUT_S = 0.5
_CAP_SYS_PTRACE = 19


class VmInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A running VM, seen from outside; no command was sent to it unless ``version`` is set.

    ``started_s``: seconds since 1970. ``uid``: the owner of its process. ``name``: may be empty.
    ``version``: its VMM's, None if the monitor was not asked or did not answer. ``accelerator``:
    ``kvm``, ``tcg``, ``unicorn``, ...; ``ram_bytes``: main RAM as started. ``qmp_addresses``: unix
    paths (absolute, reachable from here) and (host, port) pairs. ``vmm``: what runs the guest:
    ``qemu``, or a wing's kind of machine.
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
    vmm: str = "qemu"


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``/proc`` shows every user of a process. ``executable`` is empty if we may not read it.

    ``started_s``: seconds since 1970.
    """

    directory: Path
    uid: int
    started_s: float
    argv: tuple[str, ...]
    executable: str


def process_ids() -> Iterator[int]:
    """Yield all processes that we can see, ascending."""
    yield from sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def process_facts(pid: int) -> ProcessFacts | None:
    """Return the facts of one process; None if it is gone, a kernel thread or a zombie.

    Raises:
        HostError: it cannot be examined: no descriptor is free.
    """
    directory = Path(f"/proc/{pid}")
    try:
        argv = tuple(
            # A manifest holds text; a word that is not must not make a snapshot fail.
            word.decode(errors="backslashreplace")
            for word in (directory / "cmdline").read_bytes().split(b"\0")[:-1]
        )
        uid = directory.stat().st_uid
        started_s = _started_s(directory)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    except OSError as error:
        raise host_error(f"cannot look at process {pid}", error) from error
    if not argv:
        return None
    try:
        executable = str((directory / "exe").readlink()).removesuffix(" (deleted)")
    except OSError:
        executable = ""  # another user's process
    return ProcessFacts(
        directory=directory, uid=uid, started_s=started_s, argv=argv, executable=executable
    )


def _started_s(directory: Path) -> float:
    fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    for line in Path("/proc/stat").read_bytes().splitlines():
        if line.startswith(b"btime "):
            return int(line.split()[1]) + since_boot_s
    return 0.0


def may_trace_anybody(pid: int) -> bool:
    """Return whether a process has CAP_SYS_PTRACE (capabilities(7), proc(5)).

    Raises:
        OSError: it is gone.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    return False


def reachable_path(directory: Path, path: str) -> str | None:
    """Return a process's path as we can use it: absolute, and through the process's root if that
    differs from ours.

    Args:
        directory: the process's, ``/proc/PID``.
    """
    try:
        if not path.startswith("/"):
            path = f"{(directory / 'cwd').readlink()}/{path}"
        if not same_files(directory):
            path = f"{directory}/root{path}"
    except OSError:
        return path if path.startswith("/") else None
    return os.path.normpath(path)


def same_files(directory: Path) -> bool:
    """Return whether the process (``/proc/PID``) sees the same file tree as we do.

    Raises:
        OSError: we may not inspect it, or it is gone.
    """
    return all(
        (directory / link).readlink() == Path("/proc/self", link).readlink()
        for link in ("ns/mnt", "root")
    )


def asked_version(vm: VmInfo) -> str | None:
    """Connect briefly to the first free monitor of a VM, and return the version it reports."""
    for address in vm.qmp_addresses:
        if has_client(address):
            continue
        try:
            with QmpClient.connect(address, timeout_s=_PROBE_TIMEOUT_S) as qmp:
                return ".".join(str(number) for number in qmp.version)
        except StillframeError:
            continue
    return None
