"""The start of VMs from a snapshot: QEMU up, RAM watched, the state loaded, the guest running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from stillframe.errors import BusyError, MachineError, NotFoundError, StillframeError
from stillframe.kernel.injection import find_gadgets
from stillframe.qmp.client import QmpClient
from stillframe.qmp.events import QmpEvent

_START_TIMEOUT_S = 30.0
_LOAD_TIMEOUT_S = 60.0
_POLL_S = 0.002
_PIPE_BYTES = 1 << 20


class Vmm(Protocol):
    """A started VMM that waits for its stream. ``began_s``: when it started (monotonic clock).
    ``sent_bytes``: bytes of its stream that it already has."""

    began_s: float
    stream_fd: int
    sent_bytes: int

    @property
    def pid(self) -> int: ...

    @property
    def qmp_address(self) -> str: ...

    def has_ended(self) -> bool: ...

    def wait_end(self, timeout_s: float) -> bool:
        """Return whether it ends within that time."""

    def failure(self, doing: str, why: str | None = None) -> MachineError:
        """Return the error for a VMM that ended or failed."""

    def close_stream(self) -> None:
        """End the stream. Idempotent."""

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""


class Runnable(Protocol):
    """What VMs can be started on: the image of a snapshot, or of a VM that is being captured."""

    def begin(self, vms: Mapping[int, tuple[int, int] | None]) -> None:
        """Start to serve the VMs: their main loops run, and nothing is loaded yet.

        Args:
            vms: process ids and gadgets.
        """

    def sweep(self) -> None:
        """Note that the guests run."""

    def check(self) -> None:
        """Raise the error that keeps pages from the guests."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that has loaded its state. Times in milliseconds since the start of its VMM:
    ``ready_ms``: its main loop runs. ``watched_ms``: its RAM waits for pages. ``running_ms``: its
    vCPUs run their first instruction (event RESUME); None if it is paused."""

    pid: int
    state: str
    ready_ms: float
    watched_ms: float
    running_ms: float | None


class Start:
    """The start of one VM, step by step; ``close`` closes its monitor."""

    def __init__(self, vmm: Vmm, *, looks_for_gadgets: bool = False) -> None:
        self.vmm = vmm
        self._looks = looks_for_gadgets
        self.gadgets: tuple[int, int] | None = None
        self._looked_in = ""
        self._qmp: QmpClient | None = None
        self._ready_s = self.watched_s = 0.0
        self._resumed_s: float | None = None
        self._state = "inmigrate"

    @property
    def qmp(self) -> QmpClient:
        """Its monitor, from ``connect`` on."""
        assert self._qmp is not None
        return self._qmp

    def connect(self) -> None:
        """Wait until its main loop answers: from then on its start no longer touches RAM.

        Raises:
            MachineError: it ended, or does not answer.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self._qmp is None:
            if self._looks and self.gadgets is None:  # while QEMU is busy with itself
                with contextlib.suppress(StillframeError):
                    self._looked_in = self._program()
                    self.gadgets = find_gadgets(self.vmm.pid)
            if self.vmm.has_ended():
                raise self.vmm.failure("starting")
            try:
                self._qmp = QmpClient.connect(self.vmm.qmp_address, timeout_s=_START_TIMEOUT_S)
            except (NotFoundError, MachineError, BusyError) as error:
                if time.monotonic() > deadline_s:
                    raise self.vmm.failure("starting", f"no monitor: {error}") from error
                time.sleep(_POLL_S)
        if self._looked_in != self._program():  # a wrapper that has since exec'ed the VMM
            self.gadgets = None
        self._qmp.subscribe(self._note)
        self._qmp.execute("query-status")
        self._ready_s = time.monotonic()

    def _program(self) -> str:
        try:
            return os.readlink(f"/proc/{self.vmm.pid}/exe")  # noqa: PTH115
        except OSError:
            return ""

    def _note(self, event: QmpEvent) -> None:
        if event.name == "RESUME" and self._resumed_s is None:
            self._resumed_s = event.received_s

    def send(self, stream: bytes) -> None:
        """Send a short stream; a thread sends what the pipe cannot hold."""
        fd, stream = self.vmm.stream_fd, stream[self.vmm.sent_bytes :]
        with contextlib.suppress(OSError):  # beyond the user's limit: the usual size will do
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(fd, False)
        try:
            sent = os.write(fd, stream)
        except BlockingIOError:
            sent = 0
        except BrokenPipeError:
            sent = len(stream)  # the VMM reports why
        if sent == len(stream):
            self.vmm.close_stream()
        else:
            rest = memoryview(stream)[sent:]
            threading.Thread(target=self._send_rest, args=(os.dup(fd), rest), daemon=True).start()
            self.vmm.close_stream()

    @staticmethod
    def _send_rest(fd: int, rest: memoryview) -> None:
        os.set_blocking(fd, True)
        with contextlib.suppress(OSError):  # the VMM reports why
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.close(fd)

    def wait_loaded(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until it has left its incoming state.

        Args:
            check: called meanwhile; an exception from it ends the wait.

        Raises:
            MachineError: it ended, or could not load its state; the error quotes it.
        """
        doing, deadline_s = "loading the snapshot", time.monotonic() + _LOAD_TIMEOUT_S
        while self._state == "inmigrate":
            try:
                status = self.qmp.execute("query-status")
                migration = self.qmp.execute("query-migrate")
            except MachineError:
                if self.vmm.wait_end(1.0):
                    raise self.vmm.failure(doing) from None
                raise
            assert isinstance(status, dict)
            assert isinstance(migration, dict)
            self._state = str(status.get("status") or "")
            if migration.get("status") == "failed":
                why = migration.get("error-desc")
                raise self.vmm.failure(doing, str(why) if why else None)
            check()
            if time.monotonic() > deadline_s:
                took = f"it has not taken the snapshot in after {_LOAD_TIMEOUT_S:g} s"
                raise self.vmm.failure(doing, took)
            if self._state == "inmigrate":
                time.sleep(_POLL_S)

    def result(self) -> Started:
        """Return the outcome."""

        def since(moment_s: float) -> float:
            return (moment_s - self.vmm.began_s) * 1000

        running = self._state == "running"
        if running and self._resumed_s is None:
            self._resumed_s = time.monotonic()
        return Started(
            pid=self.vmm.pid,
            state=self._state,
            ready_ms=since(self._ready_s),
            watched_ms=since(self.watched_s),
            running_ms=since(self._resumed_s) if running and self._resumed_s else None,
        )

    def close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()


def start_clones(
    image: Runnable,
    vmms: Sequence[Vmm],
    stream: bytes,
    *,
    inspect: Callable[[Start], None] = lambda start: None,
) -> list[Started]:
    """Start VMs on an image that they map; an empty image is filled from now on.

    A clone runs if the snapshot's VM ran, unless its command line says ``-S``.

    Args:
        stream: see ``small_stream``.
        inspect: called when a VM's main loop runs; may raise.

    Raises:
        HostError, MachineError, RefusedError, DataError: the clones have been ended; the caller
            closes the image.
    """
    starts = ready_clones(image, vmms, inspect)
    return load_clones(image, starts, stream)


def ready_clones(
    image: Runnable, vmms: Sequence[Vmm], inspect: Callable[[Start], None] = lambda start: None
) -> list[Start]:
    """Do the first half of :func:`start_clones`: the VMs wait for their stream, and their RAM for
    pages.

    Raises:
        HostError, MachineError, RefusedError: as :func:`start_clones`.
    """
    starts = [Start(vmm, looks_for_gadgets=True) for vmm in vmms]
    try:
        for start in starts:
            start.connect()
            inspect(start)
        image.begin({start.vmm.pid: start.gadgets for start in starts})
        for start in starts:
            start.watched_s = time.monotonic()
    except BaseException:
        _kill(starts)
        raise
    return starts


def load_clones(image: Runnable, starts: Sequence[Start], stream: bytes) -> list[Started]:
    """Do the second half: the VMs get their stream, and run.

    Raises:
        HostError, MachineError, DataError: as :func:`start_clones`.
    """
    try:
        for start in starts:
            start.send(stream)
        for start in starts:
            start.wait_loaded(image.check)
        image.sweep()
        return [start.result() for start in starts]
    except BaseException:
        _kill(starts)
        raise
    finally:
        for start in starts:
            start.close()


def _kill(starts: Sequence[Start]) -> None:
    for start in starts:
        start.vmm.kill()
        start.close()
