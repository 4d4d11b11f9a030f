"""Pre-flight checks of a QEMU for devices that write guest RAM past its page tables."""

from __future__ import annotations

from collections.abc import Iterator

from stillframe.machine import Blocker
from stillframe.machine.process.inspection import Inspection
from stillframe.machine.process.preflight_host import Check


def vfio(inspection: Inspection) -> Iterator[Blocker]:
    """Find a passed-through device: it writes RAM past the VMM's page tables."""
    fds = sorted(
        target
        for target in inspection.fd_targets
        if target.startswith(("/dev/vfio", "/dev/iommu"))
        or (target.startswith("anon_inode:") and ("vfio" in target or "iommufd" in target))
    )
    devices = _devices_of(inspection, ("vfio-", "x-vfio-"))
    if fds or devices:
        yield Blocker(
            name="vfio",
            reason="a passed-through device writes RAM behind the protection, and its own state"
            f" is not saved ({', '.join(devices or fds)})",
            remedy="unplug the device",
            severity="refuse" if inspection.mode == "background" else "warn",
        )


def vhost_user(inspection: Inspection) -> Iterator[Blocker]:
    """Find a vhost-user process: it writes the shared RAM through its own mapping."""
    devices = _devices_of(inspection, ("vhost-user-",))
    if "type=vhost-user" in inspection.qmp.hmp("info network"):
        devices.append("a vhost-user network backend")
    if devices:
        yield Blocker(
            name="vhost-user",
            reason=f"another process writes the VM's RAM for {', '.join(devices)}",
            remedy="use a backend inside QEMU or the kernel (vhost=on is fine), or --mode stop",
            severity="refuse" if inspection.mode == "background" else "warn",
        )


def vhost_vdpa(inspection: Inspection) -> Iterator[Blocker]:
    """Find a vDPA device: it writes RAM by DMA."""
    fds = sorted(t for t in inspection.fd_targets if t.startswith("/dev/vhost-vdpa"))
    devices = _devices_of(inspection, ("vhost-vdpa-",))
    if fds or devices:
        yield Blocker(
            name="vhost-vdpa",
            reason=f"a vDPA device writes RAM behind the protection ({', '.join(fds + devices)})",
            remedy="unplug the device",
            severity="refuse",
        )


def rdma(inspection: Inspection) -> Iterator[Blocker]:
    """Find RDMA: it pins guest RAM and writes it by DMA."""
    fds = sorted(t for t in inspection.fd_targets if t.startswith("/dev/infiniband/uverbs"))
    devices = _devices_of(inspection, ("pvrdma",))
    if fds or devices:
        yield Blocker(
            name="rdma",
            reason=f"an RDMA adapter writes RAM behind the protection ({', '.join(fds + devices)})",
            remedy="unplug the device",
            severity="refuse",
        )


def _devices_of(inspection: Inspection, prefixes: tuple[str, ...]) -> list[str]:
    return [
        f"{kind} {path.rpartition('/')[2]}"
        for path, kind in inspection.devices.items()
        if kind.startswith(prefixes)
    ]


CHECKS: tuple[Check, ...] = (vfio, vhost_user, vhost_vdpa, rdma)
