"""The error tree, grouped by what the caller should do about it.

::

    StillframeError
    ├── UsageError          2   correct the call
    ├── RefusedError        3   change the VM, or choose another mode: this one is not safe
    ├── BusyError           4   wait and try again: this VM is being snapshotted, migrated or dumped
    ├── HostError           5   fix the host: a kernel feature, permission or program is missing
    ├── MachineError        6   look at the VM: its monitor or its process went away
    ├── SinkError           7   fix the destination: disk full, no permission, a closed pipe
    ├── DataError           8   the snapshot or stream is damaged, truncated or hostile
    │   └── UnreadableError 8   try again when it can be read
    ├── NotFoundError       9   name another VM, file or block
    ├── TrustError         10   read the snapshot's command line, then pass --trust
    ├── SnapshotFailed     11   take another: this one would have been wrong; the guest is fine
    ├── LockedError        12   give the right passphrase or identity: the data is encrypted
    ├── SnapshotCancelled 130   do nothing: the caller asked for it
    └── InternalError      70   report it: a bug in Stillframe

Every error carries ``guest_state``: what the guest does *now*, after the error.
The numbers are the exit codes of the command line; they never change their meaning.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, Literal

GuestState = Literal["running", "paused", "unknown", "none"]
"""``none``: no guest is involved (in reading a file, for instance)."""


class StillframeError(Exception):
    """Root of all errors that Stillframe raises on purpose.

    Args:
        what: one line: what happened, and to what.
        why: the reason, if it is known and not part of ``what``.
        remedy: what to do about it.
        guest_state: what the guest does now.
    """

    exit_code: ClassVar[int] = 70
    kind: ClassVar[str] = "internal"

    def __init__(
        self,
        what: str,
        *,
        why: str | None = None,
        remedy: str | None = None,
        guest_state: GuestState = "none",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.why = _without_number(why)
        self.remedy = remedy
        self.guest_state: GuestState = guest_state

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.remedy:
            text += f"; {self.remedy}"
        return text

    def as_dict(self) -> dict[str, object]:
        """Return the error as the command line's ``--json`` shows it."""
        return {
            "error": self.kind,
            "what": self.what,
            "why": self.why,
            "remedy": self.remedy,
            "guest_state": self.guest_state,
            "exit_code": self.exit_code,
        }


def _without_number(why: str | None) -> str | None:
    """Strip the ``[Errno N]`` prefix of an ``OSError``'s text, which means nothing to users."""
    return why.partition("] ")[2] if why is not None and why.startswith("[Errno ") else why


class UsageError(StillframeError):
    """The call's arguments do not make sense together, or one of them is malformed."""

    exit_code = 2
    kind = "usage"


class RefusedError(StillframeError):
    """The VM cannot be snapshotted safely as it is; nothing was done to it.

    Args:
        reasons: each blocker as (name, reason, remedy).
    """

    exit_code = 3
    kind = "refused"

    def __init__(
        self,
        what: str,
        *,
        why: str | None = None,
        remedy: str | None = None,
        guest_state: GuestState = "running",
        reasons: tuple[tuple[str, str, str], ...] = (),
    ) -> None:
        super().__init__(what, why=why, remedy=remedy, guest_state=guest_state)
        self.reasons = reasons

    def as_dict(self) -> dict[str, object]:
        return super().as_dict() | {
            "reasons": [{"name": n, "reason": r, "remedy": m} for n, r, m in self.reasons]
        }


class BusyError(StillframeError):
    """Another snapshot, a migration or a dump of the same VM is under way."""

    exit_code = 4
    kind = "busy"


class HostError(StillframeError):
    """The host lacks a kernel feature, a permission or a program; the error names it."""

    exit_code = 5
    kind = "host"


def host_error(what: str, error: OSError) -> HostError:
    """Wrap an OSError of this host or process that does not concern the VM, which runs on."""
    few = error.errno in (errno.EMFILE, errno.ENFILE)
    return HostError(
        what,
        why=error.strerror or str(error),
        remedy="raise the limit on open files (ulimit -n)" if few else None,
        guest_state="running",
    )


class MachineError(StillframeError):
    """The VM's monitor went away, answered with an error, or the VM exited."""

    exit_code = 6
    kind = "machine"


class SinkError(StillframeError):
    """The destination could not take the stream (full, not permitted, closed)."""

    exit_code = 7
    kind = "sink"


class DataError(StillframeError):
    """A snapshot or stream is damaged, truncated, hostile, or of a kind we do not read.

    Args:
        offset_bytes: where in the stream or file it was noticed, if known.
    """

    exit_code = 8
    kind = "data"

    def __init__(
        self,
        what: str,
        *,
        why: str | None = None,
        remedy: str | None = None,
        guest_state: GuestState = "none",
        offset_bytes: int | None = None,
    ) -> None:
        if offset_bytes is not None:
            what = f"{what} (at byte {offset_bytes})"
        super().__init__(what, why=why, remedy=remedy, guest_state=guest_state)
        self.offset_bytes = offset_bytes


class UnreadableError(DataError):
    """The data cannot be reached or read now; it may be intact."""

    kind = "unreadable"


class NotFoundError(StillframeError):
    """No such VM, file, block or page."""

    exit_code = 9
    kind = "not-found"


class TrustError(StillframeError):
    """A snapshot that is not the caller's own would start a program."""

    exit_code = 10
    kind = "trust"


class SnapshotFailed(StillframeError):  # noqa: N818 - a state of the job, in QEMU's word
    """The job gave up because the snapshot would not show one instant."""

    exit_code = 11
    kind = "failed"


class LockedError(StillframeError):
    """The snapshot or store is encrypted, and none of the given keys opens it."""

    exit_code = 12
    kind = "locked"


class SnapshotCancelled(StillframeError):  # noqa: N818 - a state of the job, in QEMU's word
    """The caller cancelled the snapshot; the guest runs, and nothing was left behind."""

    exit_code = 130
    kind = "cancelled"


class InternalError(StillframeError):
    """A bug in Stillframe."""

    exit_code = 70
    kind = "internal"


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise UsageError if the value is not one of the choices."""
    if value not in choices:
        raise UsageError(f"there is no {what} {value!r}", remedy=f"choose {', '.join(choices)}")
