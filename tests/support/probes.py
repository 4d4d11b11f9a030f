"""What this host can do. Each probe tries the thing itself, and says why it is missing.

The reason begins with ``missing <feature>:``; ``STILLFRAME_ALLOW_MISSING`` (see
``tests/support/skip_policy.py``) names the same features.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from guests.agent_files import data_disk_image
from guests.domain import ensure_libvirtd
from guests.initramfs import linux_initramfs
from guests.kernel import find_kernel
from guests.multiboot_guest import multiboot_image
from guests.qemu import qemu_binary
from stillframe.errors import HostError

HUGE_PAGE_BYTES = 2 << 20

_SYS_USERFAULTFD = 323  # x86-64
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_WP_FEATURES = {0: "PAGEFAULT_FLAG_WP", 12: "WP_HUGETLBFS_SHMEM", 13: "WP_UNPOPULATED"}
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12


@dataclass(frozen=True)
class Probe:
    """True if the feature is there; else ``reason`` says what is missing."""

    feature: str
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None

    def require(self) -> None:
        """Skip the running test if the feature is missing (a failure under CI)."""
        if self.reason is not None:
            pytest.skip(f"missing {self.feature}: {self.reason}")


@cache
def has_qemu() -> Probe:
    """A ``qemu-system-x86_64`` (or ``$STILLFRAME_QEMU``)."""
    try:
        qemu_binary()
    except HostError as error:
        return Probe("qemu", str(error))
    return Probe("qemu")


@cache
def has_linux_guest() -> Probe:
    """QEMU, a kernel, and a compiler for the guest's init."""
    if not has_qemu():
        return has_qemu()
    try:
        find_kernel()
        linux_initramfs()
    except HostError as error:
        return Probe("linux-guest", str(error))
    return Probe("linux-guest")


@cache
def has_guest_agent() -> Probe:
    """A QEMU guest agent for the Linux guest, and what makes its disk."""
    try:
        linux_initramfs(agent=True)
        data_disk_image()
    except HostError as error:
        return Probe("guest-agent", str(error))
    return Probe("guest-agent")


@cache
def has_multiboot_guest() -> Probe:
    """QEMU, and a compiler for the bare-metal guest."""
    if not has_qemu():
        return has_qemu()
    try:
        multiboot_image()
    except HostError as error:
        return Probe("multiboot-guest", str(error))
    return Probe("multiboot-guest")


@cache
def has_kvm() -> Probe:
    """``/dev/kvm``, usable by this user."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Probe("kvm", f"cannot open /dev/kvm: {error.strerror}")
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    except OSError as error:
        return Probe("kvm", f"/dev/kvm does not answer: {error.strerror}")
    finally:
        os.close(fd)
    if version != _KVM_API_VERSION:
        return Probe("kvm", f"/dev/kvm has the API version {version}, not {_KVM_API_VERSION}")
    return Probe("kvm")


@cache
def has_uffd_wp() -> Probe:
    """userfaultfd with the write-protection features that Stillframe wants (Linux 6.4)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return Probe("uffd-wp", f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    request = bytearray(struct.pack("<QQQ", _UFFD_API, 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_API, request)
    except OSError as error:
        return Probe("uffd-wp", f"UFFDIO_API: {error.strerror}")
    finally:
        os.close(fd)
    features = struct.unpack("<QQQ", request)[1]
    lacking = [name for bit, name in _WP_FEATURES.items() if not features >> bit & 1]
    if lacking:
        return Probe("uffd-wp", f"this kernel's userfaultfd has no {', '.join(lacking)}")
    return Probe("uffd-wp")


def has_huge_pages(mib: int) -> Probe:
    """That many MiB of free 2 MiB pages (not cached: they come and go)."""
    path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    try:
        free = int(path.read_text())
    except OSError:
        return Probe("hugetlb", "this kernel has no 2 MiB pages")
    wanted = -(-(mib << 20) // HUGE_PAGE_BYTES)
    if free < wanted:
        return Probe("hugetlb", f"{free} free 2 MiB pages, {wanted} needed (vm.nr_hugepages)")
    return Probe("hugetlb")


@cache
def has_libvirt() -> Probe:
    """A libvirtd that this test run may start and use (root), with its Python binding."""
    if os.geteuid() != 0:
        return Probe("libvirt", "only root starts libvirtd")
    try:
        import libvirt  # noqa: F401

        ensure_libvirtd()
    except (ImportError, HostError) as error:
        return Probe("libvirt", str(error))
    return Probe("libvirt")
