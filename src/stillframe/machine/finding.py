"""The VMs that run on this host, QEMUs and those of wings, and how a user names one.

A user names a VM by a QMP socket's path, host:port, a pid, or the VM's own name.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from stillframe.errors import (
    BusyError,
    HostError,
    MachineError,
    NotFoundError,
    StillframeError,
    UsageError,
)
from stillframe.kernel.ptrace import refuse_tracer
from stillframe.machine.libvirt.domain import domain_of
from stillframe.machine.libvirt.machine import connect_domain
from stillframe.machine.process.machine import ProcessMachine
from stillframe.machine.process.resume import process_state
from stillframe.machine.process.sockets import peer_pid, tcp_listener_pid, unix_listener_pids
from stillframe.machine.process.vm_info import VmInfo, asked_version, process_ids
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.machine.qemu.processes import human_monitors, read_qemu
from stillframe.qmp.client import QmpClient
from stillframe.qmp.connection import HUMAN_REMEDY, QMP_OPTION, Address, address_text, open_socket
from stillframe.wings import hooks

_CONNECT_TIMEOUT_S = 5.0
_LIST_REMEDY = "'stillframe ps' lists the running VMs"


class MachineKind(Protocol):
    """A wing's kind of VM, besides QEMU (``stillframe.wings``). ``vmm``: its name."""

    vmm: str

    def read(self, pid: int) -> list[VmInfo]:
        """Return the VMs of this kind in one process. The guests are not touched."""

    def connect(self, info: VmInfo, qmp: QmpClient) -> ProcessMachine:
        """Return the machine behind a connected monitor. Raises MachineError, HostError."""


def _kinds() -> list[MachineKind]:
    return hooks("machine")


def list_vms(*, ask_version: bool = False) -> list[VmInfo]:
    """Return the VMs that run on this host, by pid. The guests are not touched.

    Args:
        ask_version: connect briefly to each free monitor, to learn the version.
    """
    vms = [vm for pid in process_ids() for vm in vms_of(pid)]
    if ask_version:
        vms = [msgspec.structs.replace(vm, version=asked_version(vm)) for vm in vms]
    return vms


def read_vm(pid: int, *, any_program: bool = False) -> VmInfo | None:
    """Return the VM that process ``pid`` is, or None: no such process, or no VM.

    Args:
        any_program: take the process for a QEMU whatever its program is called.
    """
    return next(iter(vms_of(pid, any_program=any_program)), None)


def vms_of(pid: int, *, any_program: bool = False) -> list[VmInfo]:
    """Return the VMs of one process: none, one, or several if a wing's program runs several.

    Args:
        any_program: as ``read_vm``.
    """
    for kind in _kinds():
        if found := kind.read(pid):
            return found
    qemu = read_qemu(pid, any_program=any_program)
    return [qemu] if qemu is not None else []


def connect(vm: str | int, *, timeout_s: float = 5.0) -> ProcessMachine:
    """Connect to a running VM. The guest is not touched. The machine holds the monitor until it is
    closed, so use it as a context manager.

    Args:
        vm: QMP socket path, ``host:port``, pid, or the VM's name.
        timeout_s: how long its monitor may take to answer.

    Raises:
        NotFoundError: no such VM or socket.
        UsageError: the name is ambiguous, or the VM has no QMP monitor.
        BusyError: every monitor of the VM is held by another client.
        HostError: no permission, such as to read the process's memory.
        MachineError: the VM does not answer.
    """
    ref = str(vm)
    address = parse_address(ref)
    if address is None:
        return connect_to(find_vm(ref), timeout_s=timeout_s)
    try:
        return _machine_of(QmpClient.connect(address, timeout_s=timeout_s))
    except (BusyError, MachineError):
        for pid in unix_listener_pids(address) if isinstance(address, str) else ():
            _refuse_halted(pid)
        raise


def connect_to(vm: VmInfo, *, timeout_s: float = 5.0) -> ProcessMachine:
    """Connect to the first monitor of a VM that accepts us; as :func:`connect`.

    Raises:
        NotFoundError: the VM is gone, or the monitor belongs to another process.
        The others are those of :func:`connect`.
    """
    domain = domain_of(vm)
    if domain is not None:
        return connect_domain(vm, domain)
    machine = _machine_of(_first_free(vm, timeout_s))
    if machine.pid != vm.pid:
        machine.close()
        raise NotFoundError(
            f"the monitor of VM {_called(vm)} (pid {vm.pid}) is process {machine.pid}'s",
            remedy=_LIST_REMEDY,
        )
    return machine


def _machine_of(qmp: QmpClient) -> ProcessMachine:
    """Return the machine behind a connected monitor; close the monitor if there is none."""
    try:
        pid = pid_of_monitor(qmp.address, qmp.socket)
        vms = vms_of(pid, any_program=True) if pid is not None else []
        if not vms:
            raise NotFoundError(
                f"cannot tell which process is behind {address_text(qmp.address)}",
                why="it runs on another host, in another namespace, or as another user",
                remedy="run on the VM's host, as root or the VM's user",
            )
        info = _of_monitor(vms, qmp.address)
        domain = domain_of(info)
        if domain is not None:  # a stop that libvirt does not see would lose its leases
            qmp.close()
            return connect_domain(info, domain)
        for kind in _kinds():
            if kind.vmm == info.vmm:
                return kind.connect(info, qmp)
        return QemuMachine(info, qmp)
    except BaseException:
        qmp.close()
        raise


def _of_monitor(vms: Sequence[VmInfo], address: Address) -> VmInfo:
    """Return the VM of a process that has that monitor; the first one if none lists it."""
    return next((vm for vm in vms if address in vm.qmp_addresses), vms[0])


def _first_free(info: VmInfo, timeout_s: float) -> QmpClient:
    """Connect to the first monitor of a VM that accepts us."""
    busy: StillframeError | None = None
    for address in info.qmp_addresses:
        try:
            return QmpClient.connect(address, timeout_s=timeout_s)
        except (BusyError, NotFoundError, MachineError) as error:
            _refuse_halted(info.pid)
            busy = busy if isinstance(busy, BusyError) else error
    if busy is None:
        raise NotFoundError(f"VM {info.name or info.pid} has no QMP monitor")
    raise busy


def _refuse_halted(pid: int) -> None:
    """Raise if a tracer or SIGSTOP halts the VM's process, which is why it does not answer.

    Raises:
        HostError: a tracer has it, or it was sent SIGSTOP.
    """
    state = process_state(pid)
    if state == "t":
        refuse_tracer(pid)
    if state == "T":
        raise HostError(
            f"the VM's process {pid} is stopped",
            why="it was sent SIGSTOP",
            remedy=f"let it go on: kill -CONT {pid}",
            guest_state="paused",
        )


def parse_address(ref: str) -> Address | None:
    """Parse the address of a monitor: a path (or an existing socket), or host:port; None for
    others."""
    if ref.startswith("unix:"):
        return str(Path(ref.removeprefix("unix:")).absolute())
    if "/" in ref or _is_socket(ref):
        return str(Path(ref).absolute())
    host, colon, port = ref.removeprefix("tcp:").rpartition(":")
    if colon and port.isdigit() and 0 < int(port) < 65536:
        return (host.strip("[]") or "127.0.0.1", int(port))
    return None


def find_vm(ref: str) -> VmInfo:
    """Return the running VM that ``ref`` means; its ``qmp_addresses`` begin with the one to use.

    If only a connection shows which process a monitor's address belongs to, connect for a moment.

    Raises:
        NotFoundError: no such socket, process or VM.
        UsageError: several VMs have that name, the process is no VM, or the VM has no monitor that
            we can reach.
        HostError, MachineError, BusyError: connecting to the socket failed.
    """
    if not ref:
        raise UsageError("no VM named", remedy=_LIST_REMEDY)
    address = parse_address(ref)
    if address is not None:
        return _by_address(ref, address)
    if ref.isdigit():
        vms = vms_of(int(ref))
        if len(vms) > 1:
            raise UsageError(
                f"process {ref} has {len(vms)} {vms[0].vmm}s",
                remedy=f"name one: {', '.join(_called(vm) for vm in vms)}",
            )
        if vms:
            return _with_monitor(vms[0])
    return _with_monitor(_by_name(ref))


def find_human(ref: str) -> tuple[VmInfo, str] | None:
    """Return a QEMU without a QMP monitor, and the unix socket of its human monitor, if ``ref``
    means such a VM. The guest is not touched."""
    address = parse_address(ref)
    if address is None:
        vms = vms_of(int(ref)) if ref.isdigit() else []
        vms = vms or [vm for vm in list_vms() if vm.name == ref]
    elif isinstance(address, str):
        owners = unix_listener_pids(address)
        vms = [vm for pid in owners for vm in vms_of(pid, any_program=True)]
    else:
        return None
    if len(vms) != 1 or vms[0].qmp_addresses:
        return None
    paths = human_monitors(vms[0])
    if isinstance(address, str):
        paths = tuple(path for path in paths if os.path.realpath(path) == os.path.realpath(address))
    return (vms[0], paths[0]) if paths else None


def _by_name(name: str) -> VmInfo:
    found = [vm for vm in list_vms() if vm.name == name]
    if len(found) > 1:
        pids = ", ".join(dict.fromkeys(str(vm.pid) for vm in found))
        raise UsageError(
            f"{len(found)} VMs are called {name!r}",
            remedy=f"name one by its pid or monitor: {pids}",
        )
    if found:
        return found[0]
    if name.isdigit() and Path("/proc", name).exists():
        raise UsageError(f"process {name} is no VM", remedy=_LIST_REMEDY)
    raise NotFoundError(f"no running VM {name!r}", remedy=_LIST_REMEDY)


def _called(vm: VmInfo) -> str:
    return vm.name or next((address_text(address) for address in vm.qmp_addresses), "?")


def _with_monitor(vm: VmInfo) -> VmInfo:
    if vm.qmp_addresses:
        return vm
    raise UsageError(
        f"VM {vm.name or vm.pid} (pid {vm.pid}) has no QMP monitor that can be reached",
        remedy=f"start it with {QMP_OPTION}, or name its monitor's address;"
        f" or, as it runs, {HUMAN_REMEDY}",
    )


def _by_address(ref: str, address: Address) -> VmInfo:
    pid = _pid_behind(address)
    if pid is None:
        raise NotFoundError(
            f"cannot tell which process is behind {ref}",
            why="it runs on another host, in another network namespace, or as another user",
            remedy="run on the VM's host, as root or the VM's user",
        )
    vms = vms_of(pid, any_program=True)
    if not vms:
        raise NotFoundError(f"the VM behind {ref} (pid {pid}) is gone")
    vm = _of_monitor(vms, address)
    others = tuple(other for other in vm.qmp_addresses if other != address)
    return msgspec.structs.replace(vm, qmp_addresses=(address, *others))


def _pid_behind(address: Address) -> int | None:
    if not isinstance(address, str):
        return tcp_listener_pid(address[1])
    listeners = unix_listener_pids(address)
    if len(listeners) == 1:
        return listeners[0]
    # Bound under another name (a relative path, another mount namespace), or several sockets were
    # bound to that name in turn: ask the socket itself.
    sock = open_socket(address, _CONNECT_TIMEOUT_S)
    try:
        return pid_of_monitor(address, sock)
    finally:
        sock.close()


def pid_of_monitor(address: Address, sock: socket.socket) -> int | None:
    """Return the process behind a connected monitor, or None if it is not on this host.

    The kernel records the process that last called listen. If a manager made the socket, the VM has
    called listen again (QEMU ``util/qemu-sockets.c``: socket_listen), so it is the VM; if that
    process is no VM, prefer the only VM that holds the listening socket.
    """
    if not isinstance(address, str):
        return tcp_listener_pid(address[1])
    pid = peer_pid(sock)
    if pid is not None and read_vm(pid) is not None:
        return pid
    vms = [owner for owner in unix_listener_pids(address) if read_vm(owner) is not None]
    return vms[0] if len(vms) == 1 else pid


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116 - a user's word, not a path yet
    except (OSError, ValueError):
        return False
