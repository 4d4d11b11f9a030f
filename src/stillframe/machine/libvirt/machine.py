"""A running domain of libvirt as a machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from stillframe.errors import HostError, MachineError, SnapshotFailed, StillframeError
from stillframe.machine import Blocker, Mode, Moment
from stillframe.machine.libvirt.domain import Domain, DomainRef
from stillframe.machine.libvirt.orphan import cont_without_libvirt
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu.machine import QemuMachine
from stillframe.model import DomainRecord, MachineRecord
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError

_BRIDGE = "stillframe.machine.libvirt.bridge"
_BRIDGE_TIMEOUT_S = 15.0
_PATIENCE_S = 10.0
_PAUSE_S = 0.05


class LibvirtMachine(QemuMachine):
    """A domain, through its libvirt. Made by ``connect_domain``.

    Stop and resume go through libvirt, so its view of the domain, its events and its leases stay
    true. The first command marks the domain ``custom-monitor`` until it ends.
    """

    managed_by = "libvirt"

    def __init__(self, info: VmInfo, qmp: QmpClient, domain: Domain) -> None:
        """Prepare; the guest is not touched.

        Raises:
            HostError: we may not read the process's memory. MachineError: the process is gone.
        """
        self.domain = domain
        super().__init__(info, qmp)

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """Check as ``QemuMachine.preflight``, and for jobs of libvirt. The guest is not touched."""
        job = self.domain.job() if moment == "first" else ""
        blockers = super().preflight(mode, moment)
        if job:
            blockers.insert(
                0,
                Blocker(
                    name="libvirt-job",
                    reason=f"libvirt is at work on the domain: {job}",
                    remedy=f"wait for it to end ('virsh domjobinfo {self.domain.name}')",
                    severity="busy",
                ),
            )
        return blockers

    def describe(self) -> MachineRecord:
        """Describe as ``QemuMachine.describe``, with the domain's XML. The guest is not touched."""
        return msgspec.structs.replace(
            super().describe(),
            name=self.domain.name,
            domain=DomainRecord(
                uri=self.domain.ref.uri,
                uuid=self.domain.ref.uuid,
                xml=self.domain.xml(),
                live_xml=self.domain.live_xml(),
            ),
        )

    def cont(self) -> None:
        """Resume; the guest runs afterwards.

        Raises:
            SnapshotFailed: another client resumed it during the stop; it runs.
            MachineError: libvirt or the domain does not answer (state unknown).
        """
        try:
            super().cont()
        except QmpCommandError as error:
            if "somebody else" not in error.description:
                raise
            raise SnapshotFailed(
                "the snapshot would not show one instant",
                why=error.description,
                remedy="take another one, with nobody else controlling the domain",
                guest_state="running",
            ) from error

    def resume_at_all_costs(self) -> None:
        """Resume over our bridge, a new one, or QEMU's own monitor if libvirt is dead.

        Raises:
            MachineError: none of them answered for ten seconds; the guest's state is unknown.
        """
        deadline = time.monotonic() + _PATIENCE_S
        last: StillframeError | None = None
        while time.monotonic() < deadline:
            with contextlib.suppress(StillframeError):
                self.qmp.execute("cont", timeout_s=_PATIENCE_S)
                return
            try:
                with open_bridge(self.domain.ref) as other:
                    other.execute("cont", timeout_s=_PATIENCE_S)
                    return
            except StillframeError as error:
                last = error
            if cont_without_libvirt(self.domain.ref.uuid):
                return
            time.sleep(_PAUSE_S)
        raise MachineError(
            "the domain could not be resumed",
            why=str(last),
            remedy=f"'virsh resume {self.info.name}'",
            guest_state="unknown",
        )

    def close(self) -> None:
        """Close the bridge and libvirt's connection, and release the process; never raises."""
        super().close()
        self.domain.close()


def connect_domain(info: VmInfo, ref: DomainRef) -> LibvirtMachine:
    """Connect to a domain. The guest is not touched.

    Raises:
        HostError, NotFoundError: as ``Domain``. MachineError: the bridge does not answer.
    """
    domain = Domain(ref)
    qmp: QmpClient | None = None
    try:
        qmp = open_bridge(ref)
        return LibvirtMachine(info, qmp, domain)
    except BaseException:
        if qmp is not None:
            qmp.close()
        domain.close()
        raise


def open_bridge(ref: DomainRef) -> QmpClient:
    """Return a QMP connection to a domain, served by a separate process that outlives us if it
    must.

    Raises:
        HostError: the bridge cannot be started. MachineError: it does not answer.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # A separate session: a Ctrl-C in the terminal must not reach it.
            subprocess.Popen(
                [
                    *(sys.executable, "-m", _BRIDGE, ref.uri, ref.uuid, str(theirs.fileno())),
                    *ref.monitors,
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env=_environment(),
            )
    except OSError as error:
        ours.close()
        raise HostError("the bridge to libvirt cannot be started", why=str(error)) from error
    return QmpClient.over(ours, f"libvirt:{ref.uuid}", timeout_s=_BRIDGE_TIMEOUT_S)


def _environment() -> dict[str, str]:
    """Return our environment with the package's path: the bridge must run our own version."""

    own = str(Path(__file__).parents[3])
    return os.environ | {"PYTHONPATH": os.pathsep.join([own, os.environ.get("PYTHONPATH", "")])}
