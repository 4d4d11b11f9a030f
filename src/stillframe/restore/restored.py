"""The VMs that restores started: their records while they run, and how to end them.

Each VM has a record in its private directory. A reader accepts a record only if its own user owns
the file, so nobody else can make it kill or remove anything.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stillframe.disks.pins import PIN, pinned_by
from stillframe.errors import (
    BusyError,
    MachineError,
    NotFoundError,
    StillframeError,
    UsageError,
    host_error,
)
from stillframe.image.fill_record import FillRecord, complete_s, read_record
from stillframe.image.filling import Filling
from stillframe.machine.libvirt.domain import DomainRef, destroy_domain
from stillframe.restore.forwarded_ports import Forward
from stillframe.restore.private_directories import ROOTS_RUN, remove, runtime_root, sweep
from stillframe.still.sealing import Unlock
from stillframe.store.processes import start_ticks

RECORD_NAME = "restored.json"
IMAGE_NAME = "image.json"
LEASE = "used-by-"
"""Prefix of the lease files in a disk directory that clones share: one file per clone."""
FORKS, FORK_PREFIX = Path("/dev/shm"), "stillframe-fork-"
_LOG_NAME = "image.log"
_POLL_S = 0.05
_KILL_TIMEOUT_MS = 10_000
_MOST_BYTES = 1 << 24


class ImageFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file of an image that is mapped for a RAM block. ``changed_ns``: the change time of a
    file on a disk; while it stays the same, nothing has written to the file."""

    idstr: str
    device: int
    inode: int
    changed_ns: int = 0


class RestoredVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that was started from a snapshot, and that runs on without this process.

    ``started``: start time in ticks since boot, as in ``/proc/PID/stat``. ``snapshot``: its path;
    empty for a clone of a running VM whose snapshot was not kept. ``parent``: that running VM, for
    people. ``state``: QEMU's run state, ``running`` or ``paused``. ``qmp_address``: path of its
    monitor. ``forwards``: host ports that are forwarded to the guest.
    ``sockets``: all sockets that it listens on, including the monitor.
    ``directory``: its sockets and log; ``disk_directory``: its overlays, if it has any; None for a
    domain that was reverted to its snapshot, which keeps its overlays for good. :meth:`kill`
    removes both; otherwise the caller removes them once the VM has ended. Where the caller chose
    no directory, the next restore sweeps sockets and log away; the overlays stay, since they hold
    what the VM wrote.
    ``image_path``: the fill record of its image; None if all of RAM came before it ran, or if it
    runs on a complete image of the cache.
    ``domain``: the libvirt domain, if it is one; ``directory`` then holds its records.
    ``snapshot_id``: the id of ``snapshot`` at the time. ``image_files``: the files behind its RAM.
    Neither is recorded for a domain.
    ``leases``: lease files in disk directories that it shares with other VMs.
    ``frozen``: its file systems have been frozen since the instant; nothing has thawed them.
    ``began_s``: start of the restore (monotonic clock). ``first_instruction_ms``, ``resident_ms``:
    from then; None if it is paused, or if nobody waited: :meth:`filled_ms` tells later.
    """

    pid: int
    started: int
    name: str
    snapshot: str
    parent: str = ""
    state: str
    qmp_address: str
    log_path: str
    directory: str
    disk_directory: str | None
    sockets: tuple[str, ...]
    argv: tuple[str, ...]
    notes: tuple[str, ...]
    forwards: tuple[Forward, ...] = ()
    image_path: str | None = None
    leases: tuple[str, ...] = ()
    domain: DomainRef | None = None
    snapshot_id: str = ""
    image_files: tuple[ImageFile, ...] = ()
    frozen: bool = False
    began_s: float = 0.0
    first_instruction_ms: float | None = None
    resident_ms: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether its process still exists."""
        return start_ticks(self.pid) == self.started

    @property
    def is_being_filled(self) -> bool:
        """Whether part of its RAM is still missing."""
        return self.image_path is not None and Path(self.image_path).exists()

    @property
    def is_on_image(self) -> bool:
        """Whether its RAM is known to be on an image, complete or not; never so for a domain."""
        return bool(self.image_files)

    def wait_resident(self, timeout_s: float | None = None, unlock: Unlock | None = None) -> bool:
        """Wait until all of its RAM is there. If no process fills its image any more, fill it here.

        Args:
            unlock: gives the key of an encrypted snapshot, should this process have to fill.

        Returns:
            True once all of RAM is there; False after ``timeout_s``.

        Raises:
            MachineError: it has ended. DataError, NotFoundError: the snapshot is damaged or gone;
                the guest blocks where it touches a missing page. LockedError: it is encrypted.
                HostError: not permitted.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_running:
            if self.image_path is None or not Path(self.image_path).exists():
                return True
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            try:
                filling = Filling.adopt(Path(self.image_path), unlock)
            except BusyError:
                time.sleep(_POLL_S)
                continue
            except NotFoundError:
                if Path(self.image_path).exists():
                    raise
                return True
            try:
                if filling.wait(left_s):
                    return True
                hand_over(filling, Path(self.image_path))
            finally:
                filling.close()
        raise MachineError(f"VM {self.pid} has ended", guest_state="none")

    def resident(self) -> float | None:
        """Return the share of its image that is there, 0 to 1; None if unknown."""
        if self.image_path is None:
            return 1.0
        try:
            fd = os.open(self.image_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return 1.0
        except OSError:
            return None
        try:
            return _share(self.pid, read_record(fd))
        except (StillframeError, OSError):
            return None
        finally:
            os.close(fd)

    def filled_ms(self) -> float | None:
        """Return how long after the start of the restore all of its RAM was there, whichever
        process filled it; None while part of it is missing, or if unknown."""
        if self.resident_ms is not None:
            return self.resident_ms
        moment_s = complete_s(Path(self.image_path)) if self.image_path else None
        return (moment_s - self.began_s) * 1000 if moment_s is not None and self.began_s else None

    def kill(self) -> None:
        """End it like a power cut, and remove its directories with all that it wrote.

        Raises:
            MachineError: it does not end. HostError: it is a domain, and its libvirt is missing.
        """
        if self.domain is not None and self.is_running:
            destroy_domain(self.domain)
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.is_running:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    poll = select.poll()
                    poll.register(pidfd, select.POLLIN)
                    if not poll.poll(_KILL_TIMEOUT_MS):
                        raise MachineError(f"VM {self.pid} does not end", guest_state="unknown")
            finally:
                os.close(pidfd)
        remove(Path(self.directory))
        for lease in self.leases:
            Path(lease).unlink(missing_ok=True)
        for directory in disk_directories_of(self):
            if not _is_needed(directory):
                shutil.rmtree(directory, ignore_errors=True)
        sweep(FORKS, FORK_PREFIX)


def make_lease(directory: Path, of: str) -> Path:
    """Note in a disk directory that the VM with the directory ``of`` needs it."""
    lease = directory / f"{LEASE}{Path(of).name}"
    lease.touch(mode=0o600)
    return lease


def disk_directories_of(vm: RestoredVm) -> list[Path]:
    """Return the disk directories that go with it unless others need them: its own, and shared."""
    own = [] if vm.disk_directory is None else [Path(vm.disk_directory)]
    return [*own, *(Path(lease).parent for lease in vm.leases)]


def disk_directories(pid: int) -> list[Path]:
    """Return the disk directories that clones of a VM need, too; none if it is not one of ours."""
    return [path for vm in list_restored() if vm.pid == pid for path in disk_directories_of(vm)]


def _is_needed(directory: Path) -> bool:
    """Whether a running VM, a clone of one, or a snapshot of one has its disks there."""
    return (
        any(directory.glob(f"{LEASE}*"))
        or any(vm.disk_directory == str(directory) for vm in list_restored())
        or any(pinned_by(pin.removesuffix(PIN)) for pin in map(str, directory.glob(f"*{PIN}")))
    )


def write_vm(vm: RestoredVm) -> None:
    """Write its record into its directory, atomically."""
    new = Path(vm.directory, f".{RECORD_NAME}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(new, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
        file.write(msgspec.json.encode(vm))
    new.replace(new.with_name(RECORD_NAME))


def domains_root() -> Path:
    """Return the directory for records of domains, whose QEMUs hold no lock of ours.

    Raises:
        HostError: as ``runtime_root``.
    """
    return runtime_root() / "domains"


def sweep_domains() -> None:
    """Remove the records of domains that have ended. Never raises."""
    with contextlib.suppress(StillframeError):
        for vm in _read_all(domains_root()):
            if not vm.is_running:
                remove(Path(vm.directory))


def list_restored() -> list[RestoredVm]:
    """Return the running VMs that this user restored, by pid."""
    roots = {ROOTS_RUN} if os.geteuid() == 0 else set()
    with contextlib.suppress(StillframeError):
        roots |= {runtime_root(), domains_root()}
    found = {vm.pid: vm for root in roots for vm in _read_all(root) if vm.is_running}
    return sorted(found.values(), key=lambda vm: vm.pid)


def _read_all(root: Path) -> Iterator[RestoredVm]:
    """Raises:
    HostError: ``root`` cannot be listed.
    """
    try:
        found = list(root.glob(f"*/{RECORD_NAME}"))
    except OSError as error:
        raise host_error(f"cannot list {root}", error) from error
    for path in found:
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                if os.fstat(fd).st_uid == os.geteuid():
                    yield msgspec.json.decode(file.read(_MOST_BYTES), type=RestoredVm)


def find_restored(ref: str) -> RestoredVm:
    """Return the running VM with that name, pid, monitor or directory name.

    Raises:
        NotFoundError: this user restored no such VM. UsageError: several match.
    """
    vms = list_restored()
    for names in (lambda vm: (str(vm.pid), vm.qmp_address, Path(vm.directory).name),
                  lambda vm: (vm.name,)):  # fmt: skip
        found = [vm for vm in vms if ref and ref in names(vm)]
        if len(found) > 1:
            pids = ", ".join(str(vm.pid) for vm in found)
            raise UsageError(f"several restored VMs are called {ref!r}", remedy=f"by pid: {pids}")
        if found:
            return found[0]
    raise NotFoundError(
        f"no VM {ref!r} that was restored by you runs",
        remedy="'stillframe ps' lists the VMs, and the snapshot that each was restored from",
    )


def kill(*vms: str | int) -> list[RestoredVm]:
    """End VMs that ``restore`` or ``fork`` started, and remove what they leave.

    Args:
        vms: each by its name, pid, or monitor. No other VM is touched.

    Raises:
        NotFoundError: the caller restored no such VM; UsageError: several have that name. No VM is
            ended then. MachineError: one does not end.
    """
    found = list({vm.pid: vm for vm in [find_restored(str(ref)) for ref in vms]}.values())
    for vm in found:
        vm.kill()
    return found


def hand_over(filling: Filling, record_path: Path) -> None:
    """Hand the filling to a process of its own, with an heir that goes on if that one dies;
    HostError if neither starts: this process then fills on."""
    filling.hand_over(log_path=record_path.with_name(_LOG_NAME), heir=True)


def adopt_orphans() -> dict[int, StillframeError]:
    """Have every image of this user's VMs filled; return, by pid, why one cannot be."""
    failed: dict[int, StillframeError] = {}
    for vm in list_restored():
        path = Path(vm.image_path) if vm.image_path else None
        if path is None or not path.exists():
            continue
        try:
            filling = Filling.adopt(path)
            try:
                hand_over(filling, path)
            finally:
                filling.close()
        except BusyError:
            continue
        except StillframeError as error:
            if path.exists():
                failed[vm.pid] = error
    return failed


def _share(pid: int, record: FillRecord) -> float | None:
    """Estimate the share from the space that the image's files take, which the VM holds open."""
    files = dict.fromkeys(record.files, 0)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            status = entry.stat()
            if (status.st_dev, status.st_ino) in files:
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
    if not record.data_bytes:
        return None
    # Zero pages that the guest touched count too: cap the share, so it is never complete too early.
    return min(0.99, sum(files.values()) / record.data_bytes)
