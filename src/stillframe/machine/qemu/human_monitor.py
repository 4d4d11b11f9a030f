"""A QEMU with a human monitor only: its answers, and the commands for it.

``xen-save-devices-state`` is QMP's, so QEMU's own migration saves such a VM (see
``snapshot/by_migration.py``). Sources: QEMU ``hmp-commands.hx``, ``hmp-commands-info.hx``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stillframe.errors import BusyError, MachineError
from stillframe.kernel.proc_maps import proc_error, read_smaps
from stillframe.machine import Blocker, Mode
from stillframe.machine.process.host_cpu import cpu_ties, host_cpu
from stillframe.machine.process.preflight_host import KSM_REMEDY, merges_pages
from stillframe.machine.process.resume import process_alive, start_time
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu import human_guard
from stillframe.machine.qemu.preflight import why_unsavable
from stillframe.machine.qemu.start_directory import start_directory
from stillframe.model import MachineRecord
from stillframe.qmp.connection import open_socket

_GREETING_S = 5.0
_STATUS = re.compile(r"VM status: ([\w-]+)")
_CAPABILITY = re.compile(r"^([\w-]+): on$", re.MULTILINE)
_DEVICE = re.compile(r"^\s*dev: ([^,\s]+)", re.MULTILINE)
_HARMLESS_CAPABILITIES = frozenset({"events"})
_BEHIND_QEMU = ("vfio-", "x-vfio-", "vhost-user-", "vhost-vdpa-", "ivshmem-", "x-pci-proxy")


class HumanMonitor:
    """A connection to a human monitor. Use it as a context manager.

    Attributes:
        info: the VM. Only ``say`` and ``go_on`` change the guest's state.
    """

    def __init__(self, info: VmInfo, path: str) -> None:
        """Connect.

        Raises:
            BusyError: another client holds it. MachineError: it does not greet as a human monitor.
        """
        self.info = info
        self._path = path
        self._started = start_time(info.pid)
        self.socket = open_socket(path, _GREETING_S)
        try:
            self.socket.settimeout(_GREETING_S)
            greeting = re.match(r"QEMU ([\d.]+)", human_guard.hear(self.socket))
        except TimeoutError as error:
            self.socket.close()
            raise BusyError(
                f"the monitor {path} did not greet within {_GREETING_S:g} s",
                why="a monitor serves one client at a time",
                remedy="leave it (socat, nc, a manager)",
                guest_state="running",
            ) from error
        except OSError as error:
            self.socket.close()
            raise self._gone(error) from error
        self.socket.settimeout(human_guard.ANSWER_S)
        if greeting is None:
            self.socket.close()
            raise MachineError(f"{path} is no monitor of QEMU", guest_state="unknown")
        self.version = greeting[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    @property
    def lock_name(self) -> str:
        """As ``Machine.lock_name``."""
        return f"{self.info.pid}-{self._started}"

    def process_alive(self) -> bool:
        """As ``Machine.process_alive``."""
        return process_alive(self.info.pid, self._started)

    def say(self, line: str, fd: int | None = None) -> str:
        """Send a line, with a descriptor if given; return the answer, empty on success.

        Raises:
            MachineError: the monitor does not answer, or is gone.
        """
        try:
            return human_guard.say(self.socket, line, fd)
        except OSError as error:
            raise self._gone(error) from error

    def go_on(self, stream: int, mode: Mode) -> None:
        """Let the guest run, make QEMU's next migration an ordinary one, and close ``stream``,
        which QEMU may still write to. Raises MachineError."""
        try:
            human_guard.give_up(self.socket, stream, mode)
            human_guard.hear(self.socket)
            done = human_guard.go_on(self.socket, mode)
        except OSError as error:
            raise self._gone(error) from error
        if not done:
            raise MachineError(
                "the VM does not go on", why="its monitor refuses", guest_state="unknown"
            )

    def status(self) -> str:
        """Return the run state. Raises MachineError."""
        found = _STATUS.search(self.say("info status"))
        return found[1] if found else ""

    def blockers(self, mode: Mode) -> Iterator[Blocker]:
        """Yield what blocks a snapshot; QEMU itself refuses the rest. Raises MachineError,
        HostError."""
        status = self.status()
        if status != "running":
            yield _refusal(
                "run-state", f"the VM is {status}; QEMU's migration would let it run", "say 'cont'"
            )
        on = set(_CAPABILITY.findall(self.say("info migrate_capabilities")))
        for name in sorted(on - _HARMLESS_CAPABILITIES):
            yield _refusal(
                "capability",
                f"somebody has switched on QEMU's migration capability {name}",
                f"say 'migrate_set_capability {name} off'",
            )
        version = [int(number) for number in self.version.split(".")]
        for kind in sorted(set(_DEVICE.findall(self.say("info qtree")))):
            if why := why_unsavable(kind, version):
                yield _refusal("unsavable-device", f"it has a {kind}: {why}", "unplug it")
            if mode == "background" and kind.startswith(_BEHIND_QEMU):
                yield _refusal(
                    "unseen-writer",
                    f"RAM is written behind the protection for its {kind}",
                    "unplug it, or use --mode stop",
                )
        if mode == "background" and merges_pages() and self._mergeable():
            yield _refusal("ksm", "the host merges equal pages of the VM's RAM (KSM)", KSM_REMEDY)

    def _mergeable(self) -> bool:
        return any("mg" in detail.flags for detail in read_smaps(self.info.pid))

    def record(self, machine_type: str) -> MachineRecord:
        """Return a record of the VM, from its command line. Raises MachineError, HostError."""
        info = self.info
        try:
            executable = Path(f"/proc/{info.pid}/exe").readlink()
            directory = start_directory(info.pid, info.argv)
        except OSError as error:
            raise proc_error(info.pid, "the program's name", error) from error
        return MachineRecord(
            name=info.name,
            pid=info.pid,
            uid=info.uid,
            vmm=info.vmm,
            vmm_version=self.version,
            machine_type=machine_type,
            accelerator=info.accelerator,
            executable=str(executable).removesuffix(" (deleted)"),
            argv=info.argv,
            cwd=str(directory),
            guest_state="running",
            vcpus=len(re.findall(r"CPU #\d+", self.say("info cpus"))),
            differences=(
                "what was plugged, unplugged or changed since its start is not known: the VM has"
                " no QMP monitor",
            ),
            host_cpu=host_cpu(),
            cpu_ties=cpu_ties((), info.argv),
        )

    def _gone(self, error: OSError) -> MachineError:
        return MachineError(
            f"the monitor {self._path} does not answer", why=str(error), guest_state="unknown"
        )


def _refusal(name: str, reason: str, remedy: str) -> Blocker:
    return Blocker(name=name, reason=reason, remedy=remedy, severity="refuse")
