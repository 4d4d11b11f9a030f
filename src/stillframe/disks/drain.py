"""A forecast of how long ``stop`` will wait for the requests in flight.

QEMU's ``stop`` completes every request that it has taken from the guest, so slow storage lengthens
the downtime and nothing can move that wait out of it. Two looks at a drive's counters tell how long
a request takes now. Source: QEMU ``qapi/block-core.json`` (BlockDeviceStats); ``block/io.c``
(bdrv_drain_all), which lifts QEMU's own throttling, so a throttled drive's counters do not predict
the drain.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from stillframe.disks.drives import Drive
from stillframe.errors import RefusedError
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_int, as_list, as_map

_KINDS = ("rd", "wr", "flush")
_WINDOW_S = 0.15
_LATELY_NS = 2_000_000_000


class _Counters(msgspec.Struct, frozen=True):
    operations: int
    total_ns: int
    idle_ns: int

    def mean_ms(self, since: _Counters) -> float:
        """Return the mean time per request since then; over all, if none ended since but one did
        lately."""
        operations, total_ns = self.operations - since.operations, self.total_ns - since.total_ns
        if operations == 0 and self.idle_ns < _LATELY_NS:
            operations, total_ns = self.operations, self.total_ns
        return total_ns / operations / 1e6 if operations else 0.0


class DrainForecast:
    """A forecast begun before the preparations and read after them."""

    def __init__(self, qmp: QmpClient, drives: Sequence[Drive]) -> None:
        self._qmp = qmp
        self._drives = [drive for drive in drives if not drive.throttled]
        self._began_s = time.monotonic()
        self._first = self._look() if self._drives else {}

    def refuse_slow(self, max_drain_ms: float) -> None:
        """Refuse a drive that is too slow. The guest is not touched.

        Raises:
            RefusedError: a drive's requests take longer than ``max_drain_ms``. MachineError: lost
                the monitor.
        """
        if not self._drives:
            return
        time.sleep(max(0.0, self._began_s + _WINDOW_S - time.monotonic()))
        now = self._look()
        for drive in self._drives:
            kinds = zip(now.get(_key(drive), ()), self._first.get(_key(drive), ()), strict=False)
            mean_ms = max((one.mean_ms(before) for one, before in kinds), default=0.0)
            if mean_ms > max_drain_ms:
                raise RefusedError(
                    "slow-disk",
                    why=f"requests of disk {drive.label} take {mean_ms:.0f} ms each now, and the"
                    f" guest would stand still for as long (limit {max_drain_ms:g} ms)",
                    remedy="wait until its storage is less busy, or allow it with"
                    f" --max-drain {max(2 * mean_ms, 1):.0f}",
                )

    def _look(self) -> dict[str, list[_Counters]]:
        found = {}
        for entry in map(as_map, as_list(self._qmp.execute("query-blockstats"))):
            stats = as_map(entry.get("stats"))
            idle_ns = stats.get("idle_time_ns")
            found[str(entry.get("device") or entry.get("qdev"))] = [
                _Counters(
                    as_int(stats.get(f"{kind}_operations")),
                    as_int(stats.get(f"{kind}_total_time_ns")),
                    idle_ns if isinstance(idle_ns, int) else _LATELY_NS,
                )
                for kind in _KINDS
            ]
        return found


def _key(drive: Drive) -> str:
    return drive.device or drive.qdev
