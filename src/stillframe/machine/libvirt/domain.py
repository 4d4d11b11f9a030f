"""The VMs that are libvirt's domains, and the connection to the libvirt that runs them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from types import ModuleType

import msgspec

from stillframe.errors import HostError, MachineError, NotFoundError
from stillframe.machine.process.sockets import listening_unix_paths
from stillframe.machine.process.vm_info import VmInfo

SYSTEM_URI = "qemu:///system"
_SYSTEM_DIRECTORY = "/var/lib/libvirt/qemu/"
_MONITOR = re.compile(r"/domain-\d+-[^/]*/monitor\.sock")
_SESSION_SOCKETS = ("/libvirt/virtqemud-sock", "/libvirt/libvirt-sock")
_OLDEST = 8_002_000
"""libvirt 8.2 introduced virDomainQemuMonitorCommandWithFiles."""


class DomainRef(msgspec.Struct, frozen=True, kw_only=True):
    """A running domain: its libvirt's URI, and its UUID.

    ``monitors``: unix sockets of its monitors beside libvirt's.
    """

    uri: str
    uuid: str
    monitors: tuple[str, ...] = ()


def domain_of(vm: VmInfo) -> DomainRef | None:
    """Return the domain that a VM is, or None if libvirt did not start it.

    libvirt's monitor is bound to ``…/domain-ID-NAME/monitor.sock`` (libvirt
    ``src/qemu/qemu_domain.c``), and its QEMU has ``-uuid``.
    """
    monitor = next((a for a in vm.qmp_addresses if isinstance(a, str) and _MONITOR.search(a)), None)
    if monitor is None or "-uuid" not in vm.argv[:-1]:
        return None
    return DomainRef(
        uri=_uri(monitor, vm.uid),
        uuid=vm.argv[vm.argv.index("-uuid") + 1],
        monitors=tuple(a for a in vm.qmp_addresses if isinstance(a, str) and a != monitor),
    )


def _uri(monitor: str, uid: int) -> str:
    if _SYSTEM_DIRECTORY in monitor:  # perhaps through the root of its own mount namespace
        return SYSTEM_URI
    return session_uri(uid)


def session_uri(uid: int) -> str:
    """Return the URI of a user's session libvirt."""
    if uid == os.geteuid():
        return "qemu:///session"
    return f"qemu+unix:///session?socket={_session_socket(uid)}"


def _session_socket(uid: int) -> str:
    """Return where the session libvirt of another user listens, whatever its XDG_RUNTIME_DIR."""
    for path in listening_unix_paths(*_SESSION_SOCKETS):
        with contextlib.suppress(OSError):
            if Path(path).stat().st_uid == uid:
                return path
    return f"/run/user/{uid}{_SESSION_SOCKETS[0]}"  # a connection starts it


def libvirt_module() -> ModuleType:
    """Return libvirt's Python binding.

    Raises:
        HostError: it is not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        raise HostError(
            "the VM is a domain of libvirt, and libvirt-python is not installed",
            remedy="pip install 'stillframe[libvirt]'",
            guest_state="running",
        ) from error
    libvirt.registerErrorHandler(lambda *_: None, None)
    return libvirt  # type: ignore[no-any-return]


class Domain:
    """A connection to one running domain, for queries; the bridge handles its monitor.

    Raises:
        HostError: libvirt's binding is missing, libvirt is too old, or we may not use it.
        NotFoundError: libvirt has no such running domain.
    """

    def __init__(self, ref: DomainRef) -> None:
        self.ref = ref
        self._libvirt = libvirt_module()
        try:
            self._connection = self._libvirt.open(ref.uri)
        except self._libvirt.libvirtError as error:
            raise HostError(
                f"libvirt at {ref.uri} cannot be reached",
                why=str(error),
                remedy="start libvirtd or virtqemud, or run as a user who may manage its domains",
                guest_state="running",
            ) from error
        try:
            self._domain = self._connection.lookupByUUIDString(ref.uuid)
            version = self.libvirt_version = int(self._connection.getLibVersion())
        except self._libvirt.libvirtError as error:
            self.close()
            raise NotFoundError(f"{ref.uri} has no domain {ref.uuid}", why=str(error)) from error
        if version < _OLDEST and not ref.monitors:
            self.close()
            raise HostError(
                f"libvirt {version // 1_000_000}.{version // 1000 % 1000} is too old",
                why="descriptors can be passed to a domain's QEMU from libvirt 8.2 on",
                remedy="use a newer libvirt, or give the domain a QMP socket of its own",
                guest_state="running",
            )

    @property
    def name(self) -> str:
        return str(self._domain.name())

    def xml(self) -> str:
        """Return the XML that migration, ``virsh save`` and a restore use (MIGRATABLE, with
        secrets).

        Raises:
            MachineError: the domain is gone.
        """
        flags = self._libvirt.VIR_DOMAIN_XML_MIGRATABLE | self._libvirt.VIR_DOMAIN_XML_SECURE
        return self._xml(flags)

    def live_xml(self) -> str:
        """Return the XML of the running domain, whose ``<cpu>`` is what the guest really has.

        Raises:
            MachineError: the domain is gone.
        """
        return self._xml(0)

    def _xml(self, flags: int) -> str:
        try:
            return str(self._domain.XMLDesc(flags))
        except self._libvirt.libvirtError as error:
            raise self._gone(error) from error

    def job(self) -> str:
        """Return what libvirt is doing with the domain (migration, backup, ...), or an empty
        string.

        Raises:
            MachineError: the domain is gone.
        """
        try:
            stats = self._domain.jobStats()
            if stats.get("type", 0) == self._libvirt.VIR_DOMAIN_JOB_NONE:
                return self._block_job()
        except self._libvirt.libvirtError as error:
            raise self._gone(error) from error
        names = {
            getattr(self._libvirt, name): name.rsplit("_OPERATION_", 1)[1].lower().replace("_", " ")
            for name in dir(self._libvirt)
            if name.startswith("VIR_DOMAIN_JOB_OPERATION_")
        }
        return names.get(stats.get("operation", 0), "a job")

    def _block_job(self) -> str:
        from xml.etree import ElementTree

        disks = ElementTree.fromstring(self.live_xml()).iterfind("devices/disk/target")
        for target in disks:
            info = self._domain.blockJobInfo(target.get("dev"), 0)
            if info:
                return f"a block job on disk {target.get('dev')}"
        return ""

    def snapshot_names(self) -> list[str]:
        """Return the names of libvirt's own snapshots of the domain.

        Raises:
            MachineError: the domain is gone.
        """
        try:
            return [str(snapshot.getName()) for snapshot in self._domain.listAllSnapshots()]
        except self._libvirt.libvirtError as error:
            raise self._gone(error) from error

    def redefine_snapshot(self, xml: str) -> None:
        """Register a snapshot with libvirt, which does not verify it. The guest is not touched.

        Raises:
            MachineError: libvirt refused, in its own words.
        """
        # As the current one: a revert in libvirt 11.3 crashes libvirtd if a domain has none.
        flags = self._libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        flags |= self._libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
        try:
            self._domain.snapshotCreateXML(xml, flags)
        except self._libvirt.libvirtError as error:
            raise MachineError(
                "libvirt did not take the snapshot", why=str(error), guest_state="running"
            ) from error

    def close(self) -> None:
        """Close the connection; never raises."""
        try:
            self._connection.close()
        except self._libvirt.libvirtError:
            return

    def _gone(self, error: Exception) -> MachineError:
        return MachineError(
            f"libvirt does not answer for domain {self.ref.uuid}",
            why=str(error),
            guest_state="unknown",
        )


def destroy_domain(ref: DomainRef) -> None:
    """End a domain like a power cut; libvirt cleans up after it. Does nothing if it has ended.

    Raises:
        HostError, MachineError: libvirt does not do it.
    """
    libvirt = libvirt_module()
    try:
        connection = libvirt.open(ref.uri)
    except libvirt.libvirtError as error:
        raise HostError(f"libvirt at {ref.uri} cannot be reached", why=str(error)) from error
    try:
        connection.lookupByUUIDString(ref.uuid).destroy()
    except libvirt.libvirtError as error:
        gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
        if error.get_error_code() not in gone:
            raise MachineError("libvirt does not end the domain", why=str(error)) from error
    finally:
        connection.close()
