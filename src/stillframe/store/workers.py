"""Notes of the processes at work in a store: others leave unfinished work alone while its process
lives.

There are no locks: a note names a process and is void once that process is gone. For a process on
another host, only the note's age can tell.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import msgspec

from stillframe.store.backends.objects import Backend
from stillframe.store.processes import start_ticks

_NOTHING = "-"
_own_pid = os.getpid
GIVEN_UP_S = 24 * 3600.0
"""Age at which the note of a process on another host becomes void."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A process. ``boot``: the kernel's boot id. ``namespace``: its pid namespace
    (pid_namespaces(7)). ``started``: start time in ticks since boot. ``since_s``: wall clock at the
    time of the note."""

    boot: str
    namespace: str
    pid: int
    started: int
    since_s: float

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended, or its note on another host is older than a day."""
        if (self.boot, self.namespace) == _host():
            return start_ticks(self.pid) != self.started
        return time.time() - self.since_s > GIVEN_UP_S


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's note: it is writing or removing snapshot ``name``.

    ``about``: for a snapshot being written, its parent's name; for one being removed, its id.
    ``nonce``: makes each note unique.
    """

    name: str
    worker: Worker
    about: str = ""
    nonce: str = "0"

    @property
    def key(self) -> str:
        """Key below the prefix. The key of an empty object holds everything: it needs no room on a
        full disk, and a listing reads it."""
        w = self.worker
        parts = (self.name, w.boot, w.namespace, w.pid, w.started, int(w.since_s))
        return ".".join(str(part) or _NOTHING for part in (*parts, self.about, self.nonce))


def leave_note(backend: Backend, prefix: str, name: str, about: str = "") -> str:
    """Leave a note of this process's work; return the note's key.

    Raises:
        SinkError: not permitted.
    """
    nonce = secrets.token_hex(4)
    key = prefix + Note(name=name, worker=this_process(), about=about, nonce=nonce).key
    backend.create(key, b"")
    return key


def this_process() -> Worker:
    boot, namespace = _host()
    pid = _own_pid()
    return Worker(
        boot=boot, namespace=namespace, pid=pid, started=start_ticks(pid), since_s=time.time()
    )


def read_notes(backend: Backend, prefix: str) -> list[Note]:
    """Return all current notes."""
    found = (read_note(one.key) for one in backend.listing(prefix))
    return [note for note in found if note is not None]


def read_note(key: str) -> Note | None:
    """Decode a note's key; None if it is not a note."""
    parts = ["" if part == _NOTHING else part for part in key.rpartition("/")[2].split(".")]
    try:
        name, boot, namespace, pid, started, since_s, about, nonce = parts
        worker = Worker(
            boot=boot,
            namespace=namespace,
            pid=int(pid),
            started=int(started),
            since_s=float(since_s),
        )
    except ValueError:
        return None
    return Note(name=name, worker=worker, about=about, nonce=nonce)


def _host() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115 - an id
    except OSError:
        return "", ""
