"""A libvirt domain with this directory's Linux guest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self
from xml.sax.saxutils import escape

from guests.agent import START_TIMEOUT_S as AGENT_TIMEOUT_S
from guests.agent import wait_agent
from guests.agent_files import DISK_SERIAL, data_disk
from guests.initramfs import linux_initramfs
from guests.kernel import find_kernel
from guests.qemu import KERNEL_ARGUMENTS, START_TIMEOUT_S
from guests.serial import SerialConsole, Tick
from stillframe.errors import HostError, MachineError

URI = "qemu:///system"
_DAEMONS = ("virtlogd", "libvirtd")
_START_S = 60.0


_REAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
subprocess.Popen(sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
"""A subreaper: libvirt's QEMUs are orphans, and libvirtd waits until they are reaped, which
nothing may do in a container."""


def ensure_libvirtd() -> None:
    """Start virtlogd and libvirtd if they do not run (needs root, no systemd).

    Raises:
        HostError: they are not installed, or do not start.
    """
    for program in _DAEMONS:
        if _answers(program):
            continue
        path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
        if path is None:
            raise HostError(f"there is no program {program}", remedy="install libvirt-daemon")
        subprocess.Popen(
            [sys.executable, "-c", _REAPER, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_S
    while True:
        try:
            virsh("uri")
            return
        except subprocess.CalledProcessError as error:  # no socket yet, or a dead daemon's
            if time.monotonic() > deadline:
                raise HostError("libvirtd does not start", why=error.stderr) from error
        time.sleep(0.1)


def _answers(program: str) -> bool:
    found = subprocess.run(["pidof", program], capture_output=True, check=False)
    return found.returncode == 0


def domain_xml(
    name: str,
    directory: Path,
    *,
    ram_mib: int,
    arguments: str,
    extra_devices: str = "",
    emulator: str = "",
    own_monitor: Path | None = None,
    iothreads: int = 0,
) -> str:
    """Make a domain's XML as virt-install does, except for the kernel: balloon, RNG, agent channel,
    VNC."""
    append = escape(f"{KERNEL_ARGUMENTS} {arguments}")
    words = () if own_monitor is None else ("-qmp", f"unix:{own_monitor},server=on,wait=off")
    options = "".join(f"<qemu:arg value='{word}'/>" for word in words)
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>{uuid.uuid4()}</uuid>
  <memory unit='MiB'>{ram_mib}</memory>
  <vcpu>2</vcpu>
  {f"<iothreads>{iothreads}</iothreads>" if iothreads else ""}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{directory}/kernel</kernel>
    <initrd>{directory}/initrd</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <serial type='unix'><source mode='bind' path='{directory}/serial.sock'/></serial>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' autoport='yes'/>
    <video><model type='vga'/></video>
    {f"<emulator>{emulator}</emulator>" if emulator else ""}
    {extra_devices}
  </devices>
  {f"<qemu:commandline>{options}</qemu:commandline>" if options else ""}
</domain>
"""


class Session(Protocol):
    """A session libvirt: its URI, its user, and the directory of its pid files."""

    uri: str
    uid: int
    run: Path


class GuestDomain:
    """A domain in its own temp directory; transient on ``qemu:///system``.

    Args:
        ram_mib: RAM; the guest writes ``mem_mib`` of it, at ``rate_mib_per_s`` (0: full speed).
        extra_devices: more XML below ``<devices>``. disks: give the guest drivers for disks.
        agent: include a QEMU guest agent, and a disk that it can freeze.
        session: a session libvirt to define and run the domain on.
        emulator: another QEMU than the host's. own_monitor: add a monitor beside libvirt's.
        iothreads: number of I/O threads for the disks.
    """

    def __init__(
        self,
        *,
        ram_mib: int = 192,
        mem_mib: int = 32,
        rate_mib_per_s: int = 20,
        append: str = "",
        extra_devices: str = "",
        disks: bool = False,
        agent: bool = False,
        session: Session | None = None,
        emulator: str = "",
        own_monitor: bool = False,
        iothreads: int = 0,
    ) -> None:
        self.name = f"sf-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._ram_mib = ram_mib
        self._arguments = (
            f"sf.mem={mem_mib} sf.populate=0 sf.rate={rate_mib_per_s} sf.whole=0 sf.fill=random"
            f" sf.tick_ms=100 sf.clock_pages=1 {'sf.agent=1 ' if agent else ''}{append}"
        )
        self._extra_devices = extra_devices
        self._disks = disks
        self._agent = agent
        self._session = session
        self._emulator = emulator
        self._iothreads = iothreads
        self._has_own_monitor = own_monitor
        self.uri = URI if session is None else session.uri
        self._directory: Path | None = None
        self._console: SerialConsole | None = None

    @property
    def directory(self) -> Path:
        assert self._directory is not None
        return self._directory

    @property
    def console(self) -> SerialConsole:
        assert self._console is not None
        return self._console

    @property
    def own_monitor(self) -> Path:
        """The socket of its monitor beside libvirt's, in a directory that QEMU's user may write."""
        return self.directory / "own" / "qmp.sock"

    def start(self) -> Self:
        """Start the domain, and wait until the guest is ready.

        Raises:
            HostError: libvirt is missing. MachineError: the domain does not start.
        """
        if self._session is None:
            ensure_libvirtd()
        self._directory = Path(tempfile.mkdtemp(prefix="stillframe-domain-", dir="/var/tmp"))
        self._directory.chmod(0o755)
        try:
            shutil.copy(find_kernel(), self.directory / "kernel")
            initramfs = linux_initramfs(disks=self._disks, agent=self._agent)
            shutil.copy(initramfs, self.directory / "initrd")
            if self._agent:
                data_disk(self.directory / "data.raw")
            for file in self.directory.iterdir():
                file.chmod(0o644)
            self.own_monitor.parent.mkdir()
            self.own_monitor.parent.chmod(0o777)
            xml = self.directory / "domain.xml"
            xml.write_text(
                domain_xml(
                    self.name,
                    self.directory,
                    ram_mib=self._ram_mib,
                    arguments=self._arguments,
                    extra_devices=self._extra_devices + self._agent_disk(),
                    emulator=self._emulator,
                    own_monitor=self.own_monitor if self._has_own_monitor else None,
                    iothreads=self._iothreads,
                )
            )
            if self._session is None:
                virsh("create", str(xml))
            else:
                for path in (self.directory, *self.directory.glob("data.raw")):
                    os.chown(path, self._session.uid, -1)
                self.virsh("define", str(xml))
                self.virsh("start", self.name)
            self._console = SerialConsole(self.directory / "serial.sock")
            line = self.console.wait_line(r"^ready |^fatal|panic", timeout_s=START_TIMEOUT_S)
            if not line.startswith("ready"):
                raise MachineError("the guest did not start", why=line)
        except BaseException:
            self.stop()
            raise
        return self

    def _agent_disk(self) -> str:
        if not self._agent:
            return ""
        return f"""<disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{self.directory}/data.raw'/>
      <target dev='vdz' bus='virtio'/><serial>{DISK_SERIAL}</serial>
    </disk>"""

    def ask_agent(self, command: str, *, timeout_s: float = 60.0) -> Any:
        """Send the guest agent a command without arguments, through libvirt, which holds the
        socket; return its answer.

        Raises:
            MachineError: it did not answer in time, or answered with an error.
        """
        request = json.dumps({"execute": command})
        words = ("--timeout", str(max(1, round(timeout_s))), self.name, request)
        try:
            return json.loads(self.virsh("qemu-agent-command", *words))["return"]
        except subprocess.CalledProcessError as error:
            raise MachineError(
                f"the guest agent did not answer {command}", why=error.stderr.strip()
            ) from error

    def wait_agent(self, timeout_s: float = AGENT_TIMEOUT_S) -> None:
        """Wait until the guest agent answers; see :func:`guests.agent.wait_agent`."""
        wait_agent(lambda within_s: self.ask_agent("guest-ping", timeout_s=within_s), timeout_s)

    @property
    def qmp_path(self) -> Path:
        """The argument for ``take``: the domain's name, because libvirt holds its monitor."""
        return Path(self.name)

    @property
    def pid(self) -> int:
        run = Path("/run/libvirt/qemu") if self._session is None else self._session.run
        return int((run / f"{self.name}.pid").read_text())

    def state(self) -> str:
        """Return the state that ``virsh domstate`` prints."""
        return self.virsh("domstate", self.name).strip()

    def virsh(self, *words: str, check: bool = True) -> str:
        """Run virsh on the domain's libvirt."""
        return virsh(*words, check=check, uri=self.uri)

    def wait_tick(self, timeout_s: float = 60.0) -> Tick:
        return self.console.wait_tick(timeout_s)

    def is_progressing(self, within_s: float = 60.0) -> bool:
        return self.console.is_progressing(within_s)

    def stop(self) -> None:
        """Destroy the domain and remove its files. A second call does nothing."""
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            self.virsh("destroy", self.name)
        if self._session is not None:
            with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                self.virsh("undefine", self.name, "--snapshots-metadata")
        if self._console is not None:
            self._console.close()
            self._console = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()


def virsh(*words: str, check: bool = True, uri: str = URI) -> str:
    """Run virsh, and return what it prints."""
    command: Sequence[str] = ["virsh", "-q", "-c", uri, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if check and done.returncode:
        error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        error.add_note(done.stderr)
        raise error
    return done.stdout
