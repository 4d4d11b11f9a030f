"""One finding of the doctor."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from stillframe.errors import StillframeError

CheckStatus = Literal["ok", "warn", "fail"]
BEING_FILLED: Final = "its image is being filled: take, fork and watch wait until all is there"
_OF_FILLER: Final = frozenset({"userfaultfd", "second-mapper"})
"""Blockers of a VM whose image is still being filled: the filler maps its RAM and serves its
faults."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding.

    ``subject``: ``host`` or ``vm``. ``name``: short and stable. ``status``: ``fail`` if it rules
    out background snapshots. ``found``: what the doctor saw. ``remedy``: what to do, empty if all
    is well.
    """

    subject: Literal["host", "vm"]
    name: str
    status: CheckStatus
    found: str
    remedy: str = ""


def from_error(
    subject: Literal["host", "vm"],
    name: str,
    error: StillframeError,
    status: CheckStatus = "fail",
) -> Check:
    """Return the finding that an error states."""
    found = f"{error.what}: {error.why}" if error.why else error.what
    return Check(subject=subject, name=name, status=status, found=found, remedy=error.remedy or "")


def is_of_filler(blocker: str) -> bool:
    """Return whether the filler of a VM's image causes a blocker of that name."""
    return blocker in _OF_FILLER
