"""One finding of the doctor."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from stillframe.errors import StillframeError

CheckStatus = Literal["ok", "warn", "fail"]
BEING_FILLED: Final = "its image is being filled: take, fork and watch wait until all is there"
_OF_FILLER: Final = frozenset({"userfaultfd", "second-mapper"})
"""Blockers of a VM while its image is filled: the filler maps RAM, and waits for faults."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    ``subject``: ``host`` or ``vm``. ``name``: short and stable. ``status``: ``fail`` if no
    background snapshot can be taken because of it. ``found``: what there is. ``remedy``: what
    to do, empty if it is fine.
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
    """The finding that an error states."""
    found = f"{error.what}: {error.why}" if error.why else error.what
    return Check(subject=subject, name=name, status=status, found=found, remedy=error.remedy or "")


def is_of_filler(blocker: str) -> bool:
    """Whether a blocker of that name goes with what fills a VM's image."""
    return blocker in _OF_FILLER
