"""The checks of the host: kernel features, permissions, programs. Each is tried, not guessed."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from stillframe.doctor.checks import Check, CheckStatus, from_error
from stillframe.errors import HostError, InternalError, StillframeError
from stillframe.kernel.remote_attach import attach
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.machine.process.vm_info import may_trace_anybody
from stillframe.still.frames import compress_frame, decompress_frame
from stillframe.wings import hooks

_KERNEL_WANTED: Final = (6, 4)
_LITTLE_SPACE_BYTES: Final = 1 << 30
_VERSION_TIMEOUT_S: Final = 5.0
_END_TIMEOUT_S: Final = 2.0
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_BPF_ALLOW: Final = (6, 0, 0, 0x7FFF0000)  # BPF_RET | BPF_K, SECCOMP_RET_ALLOW


Look = Callable[[], Check]


class KindChecks(Protocol):
    """What VMs of a wing's kind need from the host (``stillframe.wings``).

    ``vmm``: their kind. ``always``: checks added to our own, by name. ``alone``: checks that
    replace ours of the same name when only such a VM is to be snapshotted.
    """

    vmm: str
    always: Mapping[str, Look]
    alone: Mapping[str, Look]


def host_checks(directory: Path, *, vmm: str | None = None) -> list[Check]:
    """Check the whole host. No guest is touched.

    Args:
        directory: where snapshots would go.
        vmm: only a VM of this kind is to be snapshotted, which may need less.
    """
    looks = dict(_CHECKS)
    kinds: list[KindChecks] = hooks("doctor")
    for kind in kinds:
        looks |= kind.always
        if kind.vmm == vmm:
            looks |= kind.alone
    checks = [_tried(name, look) for name, look in looks.items()]
    return [*checks, _space(directory)]


def _tried(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except StillframeError as error:
        return from_error("host", name, error)


def host_check(name: str, status: CheckStatus, found: str, remedy: str = "") -> Check:
    return Check(subject="host", name=name, status=status, found=found, remedy=remedy)


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return host_check(
            "kernel",
            "fail",
            f"{platform.system()} {release} on {platform.machine()}",
            "run on x86-64 Linux",
        )
    if numbers < _KERNEL_WANTED:
        return host_check(
            "kernel",
            "warn",
            f"Linux {release}",
            "use Linux 6.4 or newer; a distribution may have brought the features to this one",
        )
    return host_check("kernel", "ok", f"Linux {release}")


def check_userfaultfd() -> Check:
    with Userfaultfd.for_this_process() as uffd:
        uffd.handshake()
    return host_check("userfaultfd", "ok", "write protection of all kinds of memory that we need")


def _ptrace() -> Check:
    scope = _number("/proc/sys/kernel/yama/ptrace_scope")
    powerful = may_trace_anybody(os.getpid())
    found = f"ptrace_scope {scope}" if scope is not None else "no restriction by Yama"
    if scope in (None, 0) or (powerful and scope != 3):
        who = "VMs of any user" if powerful else "VMs of this user"
        return host_check(
            "ptrace",
            "ok" if powerful else "warn",
            f"{found}; {who} can be attached to",
            "" if powerful else "run as root for VMs of other users",
        )
    remedy = "run as root, or set kernel.yama.ptrace_scope=0"
    if scope == 3:
        remedy = "restart the host with kernel.yama.ptrace_scope below 3"
    return host_check("ptrace", "fail", f"{found}: a running VM may not be attached to", remedy)


def _attach() -> Check:
    with waiting_child() as pid:
        attach(pid).close()
    return host_check("attach", "ok", "a userfaultfd was made in another process and fetched")


def _seccomp() -> Check:
    try:
        with waiting_child(filtered=True) as pid:
            attach(pid).close()
    except StillframeError as error:
        return from_error("host", "seccomp", error, "warn")
    return host_check("seccomp", "ok", "a process under a seccomp filter (QEMU's -sandbox), too")


def _memfd() -> Check:
    try:
        os.close(os.memfd_create("stillframe-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return host_check(
            "memfd",
            "fail",
            f"memfd_create: {error.strerror}",
            "use a kernel with CONFIG_MEMFD_CREATE, and allow it in this container",
        )
    return host_check("memfd", "ok", "device state can be passed in memory")


def _zstd() -> Check:
    sample = bytes(4096)
    if decompress_frame(compress_frame(sample, 1).data, len(sample)) != sample:
        return host_check("zstd", "fail", "the library does not work", "install stillframe anew")
    program = shutil.which("zstd")
    return host_check(
        "zstd",
        "ok",
        "the library works; "
        + (f"program {program}" if program else "no zstd program (only others need it)"),
    )


def _qemu() -> Check:
    programs = sorted(
        {
            entry.name
            for place in os.get_exec_path()
            if os.path.isdir(place)  # noqa: PTH112 - is_dir() raises where we may not look
            for entry in Path(place).glob("qemu-system-*")
            if os.access(entry, os.X_OK)
        }
    )
    if not programs:
        return host_check(
            "qemu",
            "warn",
            "no qemu-system-* program on the PATH",
            "install QEMU to restore snapshots here"
            " (Debian and Ubuntu: apt-get install qemu-system-x86)",
        )
    version = _version_of(
        programs[0] if "qemu-system-x86_64" not in programs else "qemu-system-x86_64"
    )
    more = f", and {len(programs) - 1} more QEMU programs" if len(programs) > 1 else ""
    return host_check("qemu", "ok", version + more)


def _version_of(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} (does not run: {error})"
    lines = done.stdout.decode(errors="replace").splitlines()
    return f"{program}: {lines[0]}" if lines else program


def _space(directory: Path) -> Check:
    where = directory.absolute()
    try:
        free_bytes = shutil.disk_usage(where).free
    except OSError as error:
        return host_check("space", "warn", f"{where}: {error.strerror}", "choose another directory")
    found = f"{free_bytes / (1 << 30):.1f} GiB free in {where}"
    if free_bytes < _LITTLE_SPACE_BYTES:
        return host_check("space", "warn", found, "free some space, or write snapshots elsewhere")
    return host_check("space", "ok", found)


@contextmanager
def waiting_child(*, filtered: bool = False) -> Iterator[int]:
    """Start a small process of ours that waits, to attach to as to a VM; yield its pid.

    Args:
        filtered: put a seccomp filter on it that allows everything.
    """
    try:
        process = subprocess.Popen(
            ["cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            preexec_fn=_filter_ourselves if filtered else None,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError("a small process to try it on cannot be started", why=str(error)) from error
    try:
        _wait_until_it_runs(process)
        yield process.pid
    finally:
        process.kill()
        process.communicate(timeout=_END_TIMEOUT_S)


def _wait_until_it_runs(process: subprocess.Popen[bytes]) -> None:
    """Wait until the child answers: then its libraries are mapped."""
    if process.stdin is None or process.stdout is None:
        raise InternalError("a pipe is missing")
    process.stdin.write(b".")
    ready = select.poll()  # takes descriptors of any number
    ready.register(process.stdout, select.POLLIN)
    if not ready.poll(_END_TIMEOUT_S * 1e3):
        raise HostError("a small process to try it on does not answer")
    process.stdout.read(1)


def _filter_ourselves() -> None:
    """Put a one-instruction "allow" filter on the calling process (seccomp(2))."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", *_BPF_ALLOW))
    header = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


_CHECKS: Final[dict[str, Look]] = {
    "kernel": _kernel,
    "userfaultfd": check_userfaultfd,
    "ptrace": _ptrace,
    "attach": _attach,
    "seccomp": _seccomp,
    "memfd": _memfd,
    "zstd": _zstd,
    "qemu": _qemu,
}
