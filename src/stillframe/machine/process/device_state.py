"""The state of all devices but RAM, as the VMM writes it: ``xen-save-devices-state``.

QEMU opens the file itself and blocks while it writes. So it gets a memfd by ``add-fd`` if the
monitor passes descriptors, else a file in a private directory that both can reach. Everything slow
happens in ``prepare``, before the downtime; ``save`` is the one command inside it.

``live`` is always false: with true, QEMU gives up the disks of a stopped VM (QEMU
``migration/savevm.c``: qmp_xen_save_devices_state). The bytes are a migration stream without
configuration, RAM and vmdescription. QEMU checks no migration blocker here: see ``preflight``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from stillframe.errors import MachineError, RefusedError, host_error
from stillframe.kernel.proc_maps import proc_error
from stillframe.machine.process.vm_info import same_files
from stillframe.qmp.client import AddedFd, QmpClient
from stillframe.qmp.command import Command
from stillframe.vmstate.wire import STREAM_START

_COMMAND = "xen-save-devices-state"
_MAX_BYTES = 1 << 30


class DeviceStateSaver:
    """The saver of a VM's device state, once or several times. Not thread-safe."""

    def __init__(self, qmp: QmpClient, pid: int) -> None:
        self._qmp = qmp
        self._pid = pid
        self._fd = -1
        self._added: AddedFd | None = None
        self._directory: str | None = None
        self._path = ""

    def prepare(self) -> None:
        """Create the buffer and hand it to the VMM. The guest is not touched.

        Raises:
            RefusedError: over TCP, if the VMM shares no directory with us.
            MachineError: the monitor went away.
        """
        if self._fd >= 0:
            return
        if self._qmp.passes_fds:
            self._prepare_memfd()
        else:
            self._prepare_file()

    def _prepare_memfd(self) -> None:
        try:
            self._fd = os.memfd_create("stillframe-device-state", os.MFD_CLOEXEC)
            # An fd set hands out a descriptor only if its access mode is exactly the one asked for,
            # and saving asks for write-only.
            write_only = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                self._added = self._qmp.add_fd(write_only)
            finally:
                os.close(write_only)
        except OSError as error:
            self.finish()
            raise host_error("no memory for the device state", error) from error
        except BaseException:
            self.finish()
            raise
        self._path = self._added.path

    def _prepare_file(self) -> None:
        shared = _shared_directory(self._pid)
        try:
            directory = self._directory = tempfile.mkdtemp(prefix="stillframe-", dir=shared)
            path = Path(directory) / "device-state"
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            _give_to_vmm(self._pid, Path(directory), path)
        except OSError as error:
            self.finish()
            raise RefusedError(
                "the VM cannot be given a file for its device state",
                why=error.strerror or str(error),
                remedy="give the VM a unix socket for QMP, which passes descriptors",
                guest_state="unknown",
            ) from error
        self._path = str(path)

    def save(self, then: Command | None = None, *, timeout_s: float = 30.0) -> bytes:
        """Save the device state now and return it: a stream header, FULL sections, EOF.

        ``then``: the likely next command, announced behind this one.

        The guest should be stopped (QEMU stops and continues a running one); its run state
        afterwards is the same as before, and it keeps its disks.

        Raises:
            QmpCommandError: a device cannot be saved. MachineError: the monitor went away, or what
                the VMM wrote is no stream.
        """
        self.prepare()
        # Descriptors of an fd set share one file offset, so a second save appends; QEMU opens a
        # path anew, and truncates it.
        start = os.fstat(self._fd).st_size if self._added is not None else 0
        self._qmp.execute(_COMMAND, self._arguments(), timeout_s=timeout_s, announce=then)
        return self._taken(start)

    def announce(self) -> None:
        """If prepared, have the VMM read all of the save command but its end ahead of time.

        Raises:
            MachineError: the monitor went away.
        """
        if self._fd >= 0:
            self._qmp.announce(_COMMAND, self._arguments())

    def _arguments(self) -> dict[str, object]:
        return {"filename": self._path, "live": False}

    def _taken(self, start: int) -> bytes:
        length = os.fstat(self._fd).st_size - start
        if not 0 < length <= _MAX_BYTES:
            raise MachineError(
                f"the VM saved {length} bytes of device state", guest_state="unknown"
            )
        parts: list[bytes] = []
        while length > 0:
            part = os.pread(self._fd, length, start)
            if not part:
                break
            parts.append(part)
            start, length = start + len(part), length - len(part)
        data = b"".join(parts)
        if data[: len(STREAM_START)] != STREAM_START:
            raise MachineError("the VM's device state is no stream", guest_state="unknown")
        return data

    def finish(self) -> None:
        """Release the buffer; never raises. The guest is not touched."""
        if self._added is not None:
            with contextlib.suppress(MachineError):
                self._qmp.remove_fd(self._added)
            self._added = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> DeviceStateSaver:
        self.prepare()
        return self

    def __exit__(self, *_error: object) -> None:
        self.finish()


def save_device_state(qmp: QmpClient, pid: int) -> bytes:
    """Prepare, save and clean up in one call; see ``DeviceStateSaver.save``.

    Raises:
        RefusedError, MachineError: as ``DeviceStateSaver``.
    """
    with DeviceStateSaver(qmp, pid) as saver:
        return saver.save()


def _shared_directory(pid: int) -> str:
    """Return a directory for temporary files that the VMM sees under the same name."""
    try:
        shared = same_files(Path(f"/proc/{pid}"))
    except OSError as error:
        raise proc_error(pid, "the mount namespace", error) from error
    if not shared:
        raise RefusedError(
            "the VM sees other files than we do, and its QMP passes no descriptors",
            remedy="give the VM a unix socket for QMP, which passes descriptors",
            guest_state="unknown",
        )
    return tempfile.gettempdir()


def _give_to_vmm(pid: int, directory: Path, path: Path) -> None:
    owner = Path(f"/proc/{pid}").stat()
    if owner.st_uid != os.geteuid():
        os.chown(path, owner.st_uid, owner.st_gid)
        os.chown(directory, owner.st_uid, owner.st_gid)
