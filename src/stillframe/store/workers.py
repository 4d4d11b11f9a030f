"""Who is at work in a store, so that others leave what is half done alone, for as long as it lives.

No lock: a note that names a process counts for nothing once that process is gone. Of a process on
another host only the note's age can be judged.
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
"""How old the note of a process on another host may become."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A process. ``boot``: the kernel's boot id. ``namespace``: of its pid (pid_namespaces(7)).
    ``started``: in ticks since boot. ``since_s``: the wall clock when the note was made."""

    boot: str
    namespace: str
    pid: int
    started: int
    since_s: float

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended, or was not heard of for a day."""
        if (self.boot, self.namespace) == _host():
            return start_ticks(self.pid) != self.started
        return time.time() - self.since_s > GIVEN_UP_S


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is at: snapshot ``name`` is being written, or removed.

    ``about``: of the one being written the name of its parent, of the one being removed its id.
    ``nonce``: so that no two notes are one.
    """

    name: str
    worker: Worker
    about: str = ""
    nonce: str = "0"

    @property
    def key(self) -> str:
        """Below the prefix. All is in the name of an empty object: it needs no room on a disk that
        is full, and a listing tells all."""
        w = self.worker
        parts = (self.name, w.boot, w.namespace, w.pid, w.started, int(w.since_s))
        return ".".join(str(part) or _NOTHING for part in (*parts, self.about, self.nonce))


def leave_note(backend: Backend, prefix: str, name: str, about: str = "") -> str:
    """Say what this process is at; returns the note's key.

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
    """All that there are now."""
    found = (read_note(one.key) for one in backend.listing(prefix))
    return [note for note in found if note is not None]


def read_note(key: str) -> Note | None:
    """What a key says; None if it is no note."""
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
