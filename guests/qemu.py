"""A stock QEMU with one of the guests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from guests.agent import PORT_NAME, agent_execute, wait_agent
from guests.agent import START_TIMEOUT_S as AGENT_TIMEOUT_S
from guests.agent_files import DISK_SERIAL, data_disk
from guests.initramfs import linux_initramfs
from guests.kernel import find_kernel
from guests.monitor import qmp_execute
from guests.multiboot_guest import multiboot_image
from guests.serial import SerialConsole, Tick
from stillframe.errors import HostError, MachineError, UsageError
from stillframe.machine.process.sockets import listening_unix_paths

MemoryKind = Literal["private", "memfd", "shm", "file", "hugetlb"]
"""``private``: plain ``-m``. ``memfd``, ``hugetlb``: shared memory-backend-memfd.
``shm``: a shared file in /dev/shm. ``file``: a shared file on the temp directory's disk."""

Accelerator = Literal["tcg", "kvm"]
GuestKind = Literal["linux", "multiboot"]
Fill = Literal["random", "text", "zero"]

RAM_ID = "ram0"
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=0 tsc=reliable no_timer_check mitigations=off nokaslr"
    " random.trust_cpu=on init_on_alloc=0"
    # both move pages and leave stale copies in free memory, which a checker that searches for
    # pages would find
    " transparent_hugepage=never sysctl.vm.compaction_proactiveness=0"
)
SMALLEST_LINUX_MIB = 128
START_TIMEOUT_S = 60.0
SOCKETS_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


def qemu_binary() -> str:
    """Return ``$STILLFRAME_QEMU``, or ``qemu-system-x86_64`` from the PATH.

    Raises:
        HostError: there is none.
    """
    name = os.environ.get("STILLFRAME_QEMU") or "qemu-system-x86_64"
    found = shutil.which(name)
    if found is None:
        raise HostError(
            f"there is no program {name}",
            remedy="install QEMU (on Debian and Ubuntu: apt-get install qemu-system-x86)",
        )
    return found


class _SilentGuestError(MachineError):
    """QEMU runs, but its guest has printed nothing."""


class GuestVm:
    """A QEMU with a guest that writes memory, in its own temp directory.

    Args:
        guest: ``linux`` (a real kernel and our init) or ``multiboot`` (bare metal).
        ram_mib: RAM of the VM; the guest writes ``mem_mib`` of it, and fills ``populate_mib`` once.
        rate_mib_per_s: pages written per second times 4096; 0 is full speed, -1 writes nothing.
        whole: write every word of a page, not just header and check words.
        fill: the content of the populated memory.
        tick_ms: time between tick lines.
        clock_pages: pages written between two readings of the clock; use more than 1 where reading
            the TSC is slow (a VM in a VM).
        memory, accelerator, machine, vcpus: QEMU's.
        agent: include a QEMU guest agent, and a disk with a file system that it can freeze (Linux
            only).
        name: ``-name`` of the VM; None for none.
        extra: more arguments for QEMU. ``append``: more for the guest's command line.
        binary: QEMU's program; default :func:`qemu_binary`.
        directory: where to put sockets and files; default a new temp directory.
    """

    def __init__(
        self,
        guest: GuestKind = "linux",
        *,
        ram_mib: int = 256,
        mem_mib: int = 32,
        populate_mib: int = 0,
        rate_mib_per_s: int = 20,
        whole: bool = False,
        fill: Fill = "random",
        tick_ms: int = 100,
        clock_pages: int = 1,
        memory: MemoryKind = "memfd",
        accelerator: Accelerator = "tcg",
        machine: str = "q35",
        vcpus: int = 1,
        agent: bool = False,
        name: str | None = None,
        extra: Sequence[str] = (),
        append: str = "",
        binary: str | None = None,
        directory: Path | None = None,
    ) -> None:
        if guest == "linux" and ram_mib < SMALLEST_LINUX_MIB:
            raise UsageError(f"the Linux guest does not boot in {ram_mib} MiB of RAM")
        if agent and guest != "linux":
            raise UsageError("only the Linux guest has an agent")
        if mem_mib + populate_mib >= ram_mib:
            raise UsageError(
                f"{mem_mib} + {populate_mib} MiB to write do not fit into {ram_mib} MiB of RAM"
            )
        self.guest: GuestKind = guest
        self.ram_mib = ram_mib
        self.memory: MemoryKind = memory
        self.accelerator: Accelerator = accelerator
        self.machine = machine
        self.vcpus = vcpus
        self.agent = agent
        self.name = name
        self.extra = tuple(extra)
        self.binary = binary
        self.guest_arguments = (
            f"sf.mem={mem_mib} sf.populate={populate_mib} sf.rate={rate_mib_per_s}"
            f" sf.whole={int(whole)} sf.fill={fill} sf.tick_ms={tick_ms}"
            f" sf.clock_pages={clock_pages} {'sf.agent=1 ' if agent else ''}{append}"
        ).strip()
        self._given_directory = directory
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._console: SerialConsole | None = None

    @property
    def directory(self) -> Path:
        """The directory of the VM's sockets and files.

        Raises:
            UsageError: the VM was not started.
        """
        if self._directory is None:
            raise UsageError("the VM was not started")
        return self._directory

    @property
    def qmp_path(self) -> Path:
        """The Unix socket of the monitor; it serves one client at a time."""
        return self.directory / "qmp.sock"

    @property
    def serial_path(self) -> Path:
        """The Unix socket of the serial line, to which this object is connected."""
        return self.directory / "serial.sock"

    @property
    def agent_path(self) -> Path:
        """The Unix socket of the guest agent (``agent=True``); it serves one client at a time."""
        return self.directory / "qga.sock"

    @property
    def log_path(self) -> Path:
        """The file with QEMU's standard output and error."""
        return self.directory / "qemu.log"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The QEMU process.

        Raises:
            UsageError: the VM was not started.
        """
        if self._process is None:
            raise UsageError("the VM was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def console(self) -> SerialConsole:
        """The serial line.

        Raises:
            UsageError: the VM was not started.
        """
        if self._console is None:
            raise UsageError("the VM was not started")
        return self._console

    def command_line(self) -> list[str]:
        """Return QEMU's command line; build the guest if needed.

        Raises:
            HostError: QEMU, a kernel or a build tool is missing.
        """
        command = [self.binary or qemu_binary(), "-nodefaults", "-no-user-config"]
        if self.name is not None:
            command += ["-name", self.name]
        command += ["-M", self.machine + self._machine_memory(), "-accel", self.accelerator]
        command += ["-m", f"{self.ram_mib}M", "-smp", str(self.vcpus), "-display", "none"]
        command += self._memory_arguments()
        command += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        command += ["-chardev", f"socket,id=serial0,path={self.serial_path},server=on,wait=off"]
        command += ["-serial", "chardev:serial0"]
        if self.guest == "linux":
            words = self.guest_arguments
            initramfs = linux_initramfs(
                disks="sf.journal=" in words or "sf.load=" in words, agent=self.agent
            )
            command += ["-kernel", str(find_kernel()), "-initrd", str(initramfs)]
            command += ["-append", f"{KERNEL_ARGUMENTS} {self.guest_arguments}"]
        else:
            command += ["-kernel", str(multiboot_image()), "-append", self.guest_arguments]
        # the agent's disk comes last, so that the other disks keep their names
        return [*command, *self.extra, *(self._agent_arguments() if self.agent else ())]

    def _agent_arguments(self) -> list[str]:
        disk = f"file={self.directory / 'data.raw'},if=none,id={DISK_SERIAL},format=raw"
        return [
            *("-chardev", f"socket,id=qga0,path={self.agent_path},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=agent"),
            *("-device", f"virtserialport,bus=agent.0,chardev=qga0,name={PORT_NAME}"),
            *("-drive", disk),
            *("-device", f"virtio-blk-pci,drive={DISK_SERIAL},serial={DISK_SERIAL}"),
        ]

    def _machine_memory(self) -> str:
        return "" if self.memory == "private" else f",memory-backend={RAM_ID}"

    def _memory_arguments(self) -> list[str]:
        size = f"id={RAM_ID},size={self.ram_mib}M,share=on"
        match self.memory:
            case "private":
                return []
            case "memfd":
                backend = f"memory-backend-memfd,{size}"
            case "hugetlb":
                backend = f"memory-backend-memfd,{size},hugetlb=on,hugetlbsize=2M"
            case "shm" | "file":
                backend = f"memory-backend-file,{size},mem-path={self._memory_file()}"
        return ["-object", backend]

    def _memory_file(self) -> Path:
        if self.memory == "shm":
            return Path("/dev/shm") / f"stillframe-{self.directory.name}"
        return self.directory / "ram"

    def start(self, *, wait_ready: bool = True, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start QEMU; with ``wait_ready``, wait until the guest has prepared its memory.

        If the guest prints nothing, start it once more, with a warning that shows where it hung:
        under TCG on a loaded host that happens in about one of several thousand boots.

        Raises:
            HostError: a program, kernel or file is missing.
            MachineError: QEMU ended at once, or the guest was not ready in time.
        """
        try:
            return self._start(wait_ready, timeout_s)
        except _SilentGuestError as silent:
            warnings.warn(f"started once more: {silent}", stacklevel=2)
        return self._start(wait_ready, timeout_s)

    def _start(self, wait_ready: bool, timeout_s: float) -> Self:
        if self._given_directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="stillframe-vm-"))
        else:
            self._directory = self._given_directory
        try:
            if self.agent:
                data_disk(self.directory / "data.raw")
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command_line(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._wait_socket(time.monotonic() + SOCKETS_TIMEOUT_S)
            self._console = SerialConsole(self.serial_path)
            if wait_ready:
                self._wait_ready(timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_socket(self, deadline: float) -> None:
        sockets = {str(self.serial_path), str(self.qmp_path)}
        while not sockets <= set(listening_unix_paths(*sockets)):
            if self.process.poll() is not None:
                raise MachineError("QEMU ended at its start", why=self._last_words())
            if time.monotonic() > deadline:
                raise MachineError("QEMU did not make its sockets in time", why=self._last_words())
            time.sleep(0.01)

    def _wait_ready(self, timeout_s: float) -> None:
        try:
            line = self.console.wait_line(r"^ready |^fatal|panic", timeout_s=timeout_s)
        except MachineError as error:
            if self.console.closed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_TIMEOUT_S)
                raise MachineError("QEMU ended at its start", why=self._last_words()) from error
            if not self.console.mark():
                raise _SilentGuestError(str(error), why=self._where_it_stands()) from error
            raise
        if not line.startswith("ready"):
            raise MachineError("the guest did not start", why=line)

    def _where_it_stands(self) -> str:
        """Return the run state, and the vCPUs' registers twice: they show a wait or a loop."""
        said = []
        try:
            for question in ("info status", "info registers -a", "info registers -a"):
                words: dict[str, object] = {"command-line": question}
                said.append(str(qmp_execute(self.qmp_path, "human-monitor-command", words)))
        except MachineError as error:
            said.append(str(error))
        return "\n".join(said)

    def _last_words(self) -> str:
        text = self.log_path.read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it said nothing"

    def alive(self) -> bool:
        """Return whether the QEMU process runs."""
        return self._process is not None and self._process.poll() is None

    def wait_tick(self, timeout_s: float = 60.0) -> Tick:
        """Wait for the next tick; see :meth:`SerialConsole.wait_tick`."""
        return self.console.wait_tick(timeout_s)

    def ticks(self, since: int = 0) -> list[Tick]:
        """Return all ticks since a :meth:`SerialConsole.mark`."""
        return self.console.ticks(since)

    def command(self, text: str, *, timeout_s: float = 60.0) -> str:
        """See :meth:`SerialConsole.command`."""
        return self.console.command(text, timeout_s=timeout_s)

    def ask_agent(self, command: str, *, timeout_s: float = 60.0) -> Any:
        """Send the guest agent a command without arguments; see :func:`agent_execute`."""
        return agent_execute(self.agent_path, command, timeout_s=timeout_s)

    def wait_agent(self, timeout_s: float = AGENT_TIMEOUT_S) -> None:
        """Wait until the guest agent answers; see :func:`guests.agent.wait_agent`."""
        wait_agent(lambda within_s: self.ask_agent("guest-ping", timeout_s=within_s), timeout_s)

    def is_progressing(self, within_s: float = 60.0) -> bool:
        """See :meth:`SerialConsole.is_progressing`."""
        return self.alive() and self.console.is_progressing(within_s)

    def stop(self) -> None:
        """Kill QEMU, wait for it, and remove its files. A second call does nothing."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        if self._console is not None:
            self._console.close()
            self._console = None
        if self._directory is not None:
            if self.memory in ("shm", "file"):
                self._memory_file().unlink(missing_ok=True)
            if self._given_directory is None:
                shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
