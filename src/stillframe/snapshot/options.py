"""The options of a snapshot."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

from stillframe.disks.point_in_time import DiskOptions
from stillframe.errors import UsageError, check_choice
from stillframe.snapshot.parent import Parent
from stillframe.still.frames import Compression, choose_level
from stillframe.still.sealing import DataKey

Mode = Literal["background", "stop"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
DEFAULT_SPILL_BYTES: Final = 256 << 20


def choose_adaptive_level(compression: Compression, level: int | None) -> int | Literal["adaptive"]:
    """Return the ``compression_level`` for a caller's choice; errors as ``choose_level``."""
    if (compression, level) == ("zstd", None):
        return "adaptive"
    return choose_level(compression, level)


class SnapshotOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one snapshot.

    ``compression_level``: zstd level, ``LEVEL_NONE`` to store pages uncompressed; ``adaptive``
    varies it during the job so that the snapshot is durable soonest.
    ``spill_bytes``: most memory for pages that the guest overwrites before they are written out.
    ``max_bandwidth_bytes_per_s``: limit on the rate into the sink; None is unlimited.
    ``mode``: ``background``, or ``stop`` to keep the VM stopped while RAM is saved.
    ``arm``: protect RAM before the stop, so that the downtime does not grow with RAM.
    ``for_analysis``: save RAM only; this works even if a device cannot be saved.
    ``workers``: number of encoder threads; None chooses.
    ``key``: encrypts the file; None leaves it unencrypted.
    ``parent``: save only what changed since that snapshot.
    ``disks``: what happens to the VM's disks; see :class:`DiskOptions`.

    Raises:
        UsageError: an option makes no sense.
    """

    compression_level: int | Literal["adaptive"] = "adaptive"
    spill_bytes: int = DEFAULT_SPILL_BYTES
    max_bandwidth_bytes_per_s: int | None = None
    mode: Mode = "background"
    arm: bool = True
    workers: int | None = None
    for_analysis: bool = False
    key: DataKey | None = None
    disks: DiskOptions = DiskOptions()
    parent: Parent | None = None

    def __post_init__(self) -> None:
        if self.spill_bytes <= 0:
            raise UsageError(f"a spill of {self.spill_bytes} bytes makes no sense")
        if self.max_bandwidth_bytes_per_s is not None and self.max_bandwidth_bytes_per_s <= 0:
            raise UsageError(
                f"a bandwidth of {self.max_bandwidth_bytes_per_s} bytes/s makes no sense"
            )
        check_choice("mode", self.mode, MODES)
