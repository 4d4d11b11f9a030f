"""A QMP server in front of libvirt's API, in a process of its own.

libvirtd holds the monitor of its QEMUs. This process takes QMP commands from one end of a socket
pair and runs them on a monitor beside that one (``own_monitor``), or else through libvirt. So a
``QmpClient`` talks to a domain as to any QEMU, and the guard, which shares that client's socket,
continues the guest through it if the snapshotter dies::

    python -m stillframe.machine.libvirt.bridge URI UUID FD [SOCKET...]

* ``stop`` and ``cont`` become virDomainSuspend and virDomainResume: libvirt gives up the leases of
  a lock manager at a raw ``stop``, and only its own resume takes them again.
* A descriptor sent with a command travels with it (virDomainQemuMonitorCommandWithFiles, 8.2).
* Events are QEMU's own. libvirt does not order them against replies, so ``cont`` is answered only
  after its RESUME has been passed on; another client's RESUME before it fails the command.
* ``stillframe-agent`` passes a command on to the guest agent (virDomainQemuAgentCommand).
* If libvirtd dies meanwhile, its QEMU's sockets are free: ``cont`` and a thaw go straight there.

Sources: libvirt ``include/libvirt/libvirt-qemu.h``, ``src/qemu/qemu_driver.c``.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import libvirt
import libvirt_qemu

from stillframe.errors import StillframeError
from stillframe.machine.libvirt.orphan import cont_without_libvirt, thaw_without_libvirt
from stillframe.machine.libvirt.own_monitor import connect_own, make_own
from stillframe.qmp.command import QmpCommandError

_RESUME_EVENT_S = 2.0
_PATIENCE_S = 30.0
_PAUSE_S = 0.05
_FDS_AT_ONCE = 8
_THAW = "guest-fsfreeze-thaw"
_EVENTS = "^(?!JOB_STATUS_CHANGE$)"
"""In the stop, each copy sends three JOB_STATUS_CHANGE as it begins, and no client listens."""
_TOO_LATE_S = 0.0005
"""The guest's clock and ours are the host's; an event this long before our call is not ours."""

Json = dict[str, Any]


class _CommandError(Exception):
    """A command failed; ``kind`` is QMP's error class."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class Bridge:
    """One domain behind one socket."""

    def __init__(self, uri: str, uuid: str, sock: socket.socket, paths: Sequence[str]) -> None:
        # The event loop must exist before the connection that delivers events.
        libvirt.virEventRegisterDefaultImpl()
        libvirt.registerErrorHandler(lambda *_: None, None)
        self._socket = sock
        self._connection = libvirt.open(uri)
        self._domain = self._connection.lookupByUUIDString(uuid)
        self._write_lock = threading.Lock()
        self._resumed: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._fds: list[int] = []
        self._stopped_s: float | None = None
        self._register_events()
        threading.Thread(target=self._run_events, name="libvirt-events", daemon=True).start()
        self._own = connect_own(paths)

    def serve(self) -> None:
        """Answer commands until every copy of the other end is closed."""
        version = self._ask({"execute": "query-version"})
        if self._own is None and _makes_monitors(version):
            self._own = make_own(self._ask_libvirt, (_CommandError, libvirt.libvirtError))
        self._send(_greeting(version))
        for command in self._commands():
            if "execute" not in command:
                continue
            answer: Json = {"id": command["id"]} if "id" in command else {}
            try:
                self._send({"return": self._run(command), **answer})
            except _CommandError as error:
                self._send({"error": {"class": error.kind, "desc": str(error)}, **answer})
            except libvirt.libvirtError as error:
                self._send({"error": {"class": "GenericError", "desc": str(error)}, **answer})

    # Commands

    def _run(self, command: Json) -> Any:
        name = command["execute"]
        if name == "qmp_capabilities":
            return {}
        if name == "stop":
            return self._stop()
        if name == "cont":
            return self._cont()
        if name == "stillframe-agent":
            return self._ask_agent(**command["arguments"])
        command.pop("id", None)
        if name in ("add-fd", "getfd") and self._fds:
            fd = self._fds.pop(0)
            try:
                return self._ask(command, [fd])
            finally:
                os.close(fd)
        return self._ask(command)

    def _ask(self, command: Json, fds: list[int] | None = None) -> Any:
        """Run one QMP command, on a monitor beside libvirt's if there is one.

        Raises:
            _CommandError: QEMU answered with an error. libvirtError: libvirt did not run it.
        """
        if self._own is None or not self._own.alive:
            return self._ask_libvirt(command, fds)
        try:
            for fd in fds or ():
                self._own.send_fd(fd)
            arguments = command.get("arguments")
            return self._own.execute(command["execute"], arguments, timeout_s=_PATIENCE_S)
        except QmpCommandError as error:
            raise _CommandError(error.description, error.error_class) from error
        except StillframeError as error:
            raise _CommandError(str(error)) from error

    def _ask_libvirt(self, command: Json, fds: list[int] | None = None) -> Any:
        """Run one QMP command through libvirt.

        Raises:
            _CommandError: QEMU answered with an error. libvirtError: libvirt did not run it.
        """
        text = json.dumps(command)
        if fds:
            answer = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, text, fds, 0)
        else:
            answer = libvirt_qemu.qemuMonitorCommand(self._domain, text, 0)
        # With files, the binding returns the text and the descriptors that came back (none).
        reply = json.loads(answer[0] if isinstance(answer, tuple) else answer)
        if "error" in reply:
            raise _CommandError(reply["error"].get("desc", ""), reply["error"].get("class", ""))
        return reply.get("return")

    def _ask_agent(self, request: Json, seconds: int) -> Json:
        """Return the agent's reply; a thaw gets through even while libvirtd restarts.

        Raises:
            _CommandError: the agent does not answer in time, or refused. libvirtError: there is
                none.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                text = libvirt_qemu.qemuAgentCommand(self._domain, json.dumps(request), seconds, 0)
                return dict(json.loads(text))
            except (ValueError, TypeError, RecursionError) as error:
                raise _CommandError("the guest's agent says nothing that is an answer") from error
            except libvirt.libvirtError as error:
                if request["execute"] == _THAW and not self._reconnected():
                    if thaw_without_libvirt(self._domain.UUIDString()):
                        return {"return": 0}
                    if time.monotonic() < deadline:
                        time.sleep(_PAUSE_S)
                        continue
                silent = error.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
                kind = "AgentUnresponsive" if silent else "GenericError"
                raise _CommandError(str(error), kind) from error

    def _stop(self) -> Json:
        self._stopped_s = time.time()
        while not self._resumed.empty():
            self._resumed.get()
        self._domain.suspend()
        return {}

    def _cont(self) -> Json:
        """Resume, by every available way.

        Raises:
            _CommandError: another client resumed the guest during the stop; it runs.
        """
        deadline = time.monotonic() + _PATIENCE_S
        called_s = time.time()
        while True:
            try:
                self._domain.resume()
                break
            except libvirt.libvirtError as error:
                code = error.get_error_code()
                if code == libvirt.VIR_ERR_OPERATION_INVALID and self._runs():
                    break
                if code == libvirt.VIR_ERR_NO_DOMAIN or time.monotonic() > deadline:
                    raise
                if not self._reconnected() and cont_without_libvirt(self._domain.UUIDString()):
                    return {}
                time.sleep(_PAUSE_S)
        self._check_alone(called_s)
        return {}

    def _check_alone(self, called_s: float) -> None:
        """Wait until our own call's RESUME has been passed on; refuse an earlier one, which was not
        ours."""
        if self._stopped_s is None:
            return
        began_s, self._stopped_s = self._stopped_s, None
        deadline = time.monotonic() + _RESUME_EVENT_S
        seen_s = 0.0
        while seen_s < called_s - _TOO_LATE_S:
            try:
                seen_s = self._resumed.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                seen_s = began_s  # the guest ran already, so QEMU sent no event
            if began_s <= seen_s < called_s - _TOO_LATE_S:
                raise _CommandError("somebody else let the guest go on while it stood still")

    def _runs(self) -> bool:
        return bool(self._domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)

    def _reconnected(self) -> bool:
        """Return whether libvirtd answers; reconnect if it has restarted."""
        with contextlib.suppress(libvirt.libvirtError):
            if self._connection.isAlive():
                return True
        try:
            connection = libvirt.open(self._connection.getURI())
            self._domain = connection.lookupByUUIDString(self._domain.UUIDString())
            self._connection = connection
            self._register_events()
        except libvirt.libvirtError:
            return False
        return True

    # Events

    def _register_events(self) -> None:
        libvirt_qemu.qemuMonitorEventRegister(
            *(self._connection, self._domain, _EVENTS, self._on_event, None),
            libvirt_qemu.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
        )

    def _run_events(self) -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    def _on_event(
        self,
        connection: Any,
        domain: Any,
        event: str,
        seconds: int,
        micros: int,
        details: str | None,
        opaque: Any,
    ) -> None:
        message: Json = {
            "timestamp": {"seconds": seconds, "microseconds": micros},
            "event": event,
        }
        if details:
            message["data"] = json.loads(details)
        self._send(message)
        if event == "RESUME":
            self._resumed.put(seconds + micros / 1e6)

    # The socket

    def _commands(self) -> Iterator[Json]:
        decoder, text = json.JSONDecoder(), ""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                data, fds, _flags, _ = socket.recv_fds(self._socket, 1 << 16, _FDS_AT_ONCE)
            except OSError:
                return
            if not data:
                return
            self._fds += fds
            # The byte that flushes QEMU's parser drops what came before it.
            _, flush, tail = data.rpartition(b"\xff")
            if flush:
                utf8.reset()
                text = ""
            text += utf8.decode(tail)
            while text := text.lstrip():
                try:
                    command, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    break  # the rest is still to come
                text = text[end:]
                if isinstance(command, dict):
                    yield command

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._write_lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\r\n")


def _makes_monitors(version: Json) -> bool:
    """Return whether a monitor is an object that can be added: from QEMU 11.1 on
    (``qapi/qom.json``)."""
    number = version.get("qemu", {})
    return (number.get("major", 0), number.get("minor", 0)) >= (11, 1)


def _greeting(version: Any) -> Json:
    return {"QMP": {"version": version, "capabilities": []}}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    uri, uuid, fd, *paths = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    try:
        Bridge(uri, uuid, sock, paths).serve()
    except libvirt.libvirtError as error:
        sock.sendall(json.dumps({"stillframe-error": str(error)}).encode() + b"\r\n")


if __name__ == "__main__":
    main()
