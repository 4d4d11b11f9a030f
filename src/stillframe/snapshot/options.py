"""What a caller may choose about a snapshot."""

from __future__ import annotations

from typing import Literal

import msgspec

DEFAULT_SPILL_BYTES = 256 << 20


class SnapshotOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one snapshot.

    ``compression_level``: zstd level; ``adaptive`` chooses while it runs so that the snapshot is
    durable soonest; None stores pages as they are.
    ``spill_bytes``: most memory for pages that the guest overwrote before they were written.
    ``max_bandwidth_bytes_per_s``: limit on what goes to the sink; None is unlimited.
    ``mode``: ``background``, or ``stop`` to keep the VM stopped while it is saved.
    ``arm``: protect RAM before the stop, so that the downtime does not grow with RAM.
    ``workers``: threads that encode; None chooses.
    """

    compression_level: int | Literal["adaptive"] | None = "adaptive"
    spill_bytes: int = DEFAULT_SPILL_BYTES
    max_bandwidth_bytes_per_s: int | None = None
    mode: Literal["background", "stop"] = "background"
    arm: bool = True
    workers: int | None = None
