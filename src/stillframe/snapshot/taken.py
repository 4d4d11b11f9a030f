"""The record of a finished snapshot."""

from __future__ import annotations

import msgspec

from stillframe.model import Statistics


class TakenSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A finished snapshot: its id (BLAKE3, hex), its file, the job's numbers, and notes."""

    id: str
    file: str
    statistics: Statistics
    notes: tuple[str, ...] = ()
