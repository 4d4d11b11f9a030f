"""The start of one planned domain by libvirt: from a save image (virDomainRestoreFlags), which
libvirt reads from a pipe while this process writes it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from stillframe.errors import DataError, HostError, MachineError, StillframeError
from stillframe.image.filling import Filling
from stillframe.image.small_stream import small_stream
from stillframe.machine.finding import list_vms
from stillframe.machine.libvirt.domain import (
    SYSTEM_URI,
    DomainRef,
    destroy_domain,
    libvirt_module,
)
from stillframe.restore.domain_feed import Feed, Feeder
from stillframe.restore.domain_image import SHARED_MEMORY, ImagePlace, image_place, lead, renamed
from stillframe.restore.domain_plan import DomainPlan
from stillframe.restore.records import RunAs
from stillframe.restore.untouched import memory_needed_bytes
from stillframe.still.export_libvirt import domain_of_snapshot, save_image_head
from stillframe.still.sealing import unlock_with
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate.wire import STREAM_START

_LOAD_TIMEOUT_S = 60.0
_POLL_S = 0.05


class DomainStart:
    """The start of one domain. ``runs``: whether its guest runs, once it has started.

    Args:
        running: whether the guest is to run.
        run_as: the user of its QEMU, if not the caller.
        record_path: where the image's fill record goes.

    Raises:
        HostError: libvirt is missing.
    """

    def __init__(
        self,
        plan: DomainPlan,
        snapshot: Snapshot,
        running: bool,
        run_as: RunAs | None,
        record_path: Path,
    ) -> None:
        self._plan = plan
        self._snapshot = snapshot
        self._running = running
        self._libvirt: Any = libvirt_module()
        self._run_as = run_as
        self._record_path = record_path
        self._place = plan.ram_path
        self._started = threading.Event()
        self._is_there = False
        self.runs = False

    def by_stream(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Start it after loading all of RAM."""

        def write(feed: Feed) -> None:
            sent, total = 0, self._snapshot.manifest.stream_bytes
            feed.write_head(self._head(self._plan.streamed_xml))
            for piece in self._snapshot.iter_stream():
                feed.write(piece)
                sent += len(piece)
                if on_progress is not None:
                    on_progress(sent, total)

        if str(self._place) in self._plan.streamed_xml:
            lead(self._place, SHARED_MEMORY)
        self._restore(write)

    def on_image(self) -> Filling:
        """Start it on an image, and return what fills the image from now on.

        Raises:
            HostError, MachineError, RefusedError: not possible; there is no domain.
            DataError: the snapshot is damaged.
        """
        blocks = self._plan.image.blocks
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as on_failure:
            uid = self._qemus_uid()
            needed_bytes = memory_needed_bytes(self._snapshot)
            place = stack.enter_context(image_place(self._place, uid, needed_bytes=needed_bytes))
            record_path = self._record_path
            filling = Filling.make(
                self._plan.snapshot,
                blocks,
                record_path,
                make_file=place.make_file,
                unlock=unlock_with(self._snapshot.secrets),
                parents=[file.place for file in self._snapshot.files[1:]],
                like=self._snapshot,
            )
            on_failure.callback(record_path.unlink, missing_ok=True)
            on_failure.callback(filling.close, keeps_working_set=False)
            on_failure.callback(self.destroy)  # runs before close: the domain waits for pages
            if filling.snapshot.id != self._snapshot.id:
                raise DataError(f"{self._plan.snapshot} is another snapshot than a moment ago")
            edit = renamed(self._snapshot.blocks[blocks[0]])
            stream = b"".join(small_stream(self._snapshot, blocks, edit=edit))
            self._restore(lambda feed: self._write_on_image(feed, stream, filling, place))
            filling.sweep()
            on_failure.pop_all()
            return filling

    def _write_on_image(
        self, feed: Feed, stream: bytes, filling: Filling, place: ImagePlace
    ) -> None:
        feed.write_head(self._head(self._plan.xml))
        filling.prefetch()
        feed.write(STREAM_START)
        feed.wait_until_read()  # by QEMU: nothing of its start touches RAM any more
        pid = self.find_pid()
        if pid == 0:
            raise MachineError("the domain's QEMU has ended, or is not visible from here")
        filling.begin({pid: None})
        place.is_open()
        pidfd = os.pidfd_open(pid)
        try:
            feed.write(stream[len(STREAM_START) :])
            deadline_s = time.monotonic() + _LOAD_TIMEOUT_S
            while not self._started.wait(_POLL_S):
                filling.check()
                if time.monotonic() > deadline_s:
                    took = f"it has not taken the snapshot in after {_LOAD_TIMEOUT_S:g} s"
                    raise MachineError("the domain does not start", why=took, guest_state="none")
        except StillframeError:
            # QEMU waits for a page that does not come, and libvirt waits for QEMU.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            raise
        finally:
            os.close(pidfd)

    def _head(self, xml: str) -> bytes:
        record = domain_of_snapshot(self._snapshot)
        return save_image_head(xml, record.live_xml, running=self._running)

    def _restore(self, write: Callable[[Feed], None]) -> None:
        libvirt, plan = self._libvirt, self._plan
        feeder = Feeder(self._place.with_name("save-image"), write, self._run_as)
        try:
            with _connected(libvirt, plan.uri) as connection:
                with feeder.feeding(connection.getLibVersion()) as pipe:
                    persistent = plan.revert and _end(libvirt, connection, plan.uuid)
                    try:
                        connection.restoreFlags(str(pipe), None, 0)
                        self._is_there = True
                    finally:
                        self._started.set()
                state, *_ = connection.lookupByUUIDString(plan.uuid).state()
                self.runs = state == libvirt.VIR_DOMAIN_RUNNING
                if persistent:  # last: once it is defined, its disks must stay
                    connection.defineXML(plan.streamed_xml)
        except libvirt.libvirtError as error:
            if feeder.failure is not None:
                raise feeder.failure from error
            raise MachineError(
                "libvirt did not start the domain",
                why=str(error),
                remedy="say it again; the disks that the domain had are as they were"
                if plan.revert
                else None,
                guest_state="none",
            ) from error

    def destroy(self) -> None:
        """End the domain, if it has started."""
        if not self._is_there:
            return  # in a revert, the domain with this UUID is still the one from before
        self._is_there = False
        with contextlib.suppress(StillframeError):
            destroy_domain(DomainRef(uri=self._plan.uri, uuid=self._plan.uuid))

    def find_pid(self) -> int:
        """Return the pid of its QEMU; 0 if it is not visible from here."""
        words = ("-uuid", self._plan.uuid)
        for vm in list_vms():
            if words in zip(vm.argv, vm.argv[1:], strict=False):
                return vm.pid
        return 0

    def _qemus_uid(self) -> int:
        """Return the user as whom libvirt starts QEMU (``<baselabel>`` of the model ``dac``)."""
        if self._plan.uri != SYSTEM_URI:
            return self._run_as.uid if self._run_as is not None else os.geteuid()
        try:
            with _connected(self._libvirt, self._plan.uri) as connection:
                root = ElementTree.fromstring(connection.getCapabilities())
        except self._libvirt.libvirtError as error:
            raise HostError("libvirt does not answer", why=str(error)) from error
        for model in root.iterfind("host/secmodel"):
            if model.findtext("model") == "dac":
                uid = (model.findtext("baselabel") or "").lstrip("+").partition(":")[0]
                if uid.isdigit():
                    return int(uid)
        raise HostError("libvirt does not tell as whom it starts QEMU")


def _end(libvirt: Any, connection: Any, identity: str) -> bool:
    """End the domain if it runs; return whether it is persistent."""
    try:
        domain = connection.lookupByUUIDString(identity)
    except libvirt.libvirtError:
        return False  # a transient domain that has ended
    persistent = bool(domain.isPersistent())
    if domain.isActive():
        domain.destroy()
    return persistent


@contextlib.contextmanager
def _connected(libvirt: Any, uri: str) -> Iterator[Any]:
    connection = libvirt.open(uri)
    try:
        yield connection
    finally:
        connection.close()
