"""The answer to ``query-migrate``, in QEMU's fields (``migration/migration.c``:
fill_source_migration_info, fill_destination_migration_info).

``x-stillframe`` is Stillframe's own: the job's statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stillframe.board.migration.incoming import Incoming
from stillframe.board.migration.outgoing import Outgoing
from stillframe.model import TARGET_PAGE_BYTES

_WITH_NUMBERS = ("active", "cancelling", "postcopy-active", "device", "completed")

Info = dict[str, object]


def migration_info(
    outgoing: Outgoing | None, incoming: Incoming | None, blocked_reasons: Sequence[str]
) -> Info:
    """Return the answer; an outgoing migration hides an earlier incoming one, as in QEMU."""
    info: Info = {}
    if incoming is not None:
        _add_incoming(info, incoming)
    if blocked_reasons:
        info["blocked-reasons"] = list(blocked_reasons)
    if outgoing is not None:
        _add_outgoing(info, outgoing)
    return info


def _add_incoming(info: Info, incoming: Incoming) -> None:
    arrival = incoming.arrival
    if arrival is not None and arrival.socket_address is not None:
        info["socket-address"] = [arrival.socket_address]
    if incoming.states.value != "none":
        info["status"] = incoming.states.value
    if incoming.error is not None:
        info["error-desc"] = str(incoming.error)


def _add_outgoing(info: Info, outgoing: Outgoing) -> None:
    status = outgoing.control.state
    info["status"] = status
    info.pop("error-desc", None)
    if status in _WITH_NUMBERS:
        _add_times(info, outgoing, status)
        info["ram"] = _ram(outgoing, status)
    if outgoing.error is not None:
        info["error-desc"] = str(outgoing.error)
    info["x-stillframe"] = msgspec.to_builtins(outgoing.control.progress.statistics())


def _add_times(info: Info, outgoing: Outgoing, status: str) -> None:
    counters = outgoing.counters
    info["setup-time"] = round(counters.setup_ms)
    info["total-time"] = round(counters.total_ms)
    if status in ("completed", "postcopy-active"):
        info["downtime"] = round(counters.downtime_ms)
    else:
        info["expected-downtime"] = round(counters.expected_downtime_ms)


def _ram(outgoing: Outgoing, status: str) -> Info:
    counters = outgoing.counters
    done = status == "completed"
    return {
        "transferred": counters.transferred_bytes,
        "total": counters.ram_bytes,
        "remaining": 0 if done else counters.remaining_bytes,
        "duplicate": counters.zero_pages,
        "normal": counters.data_pages,
        "normal-bytes": counters.data_pages * TARGET_PAGE_BYTES,
        "dirty-pages-rate": 0 if done else counters.dirty_pages_per_s,
        "dirty-sync-count": counters.dirty_syncs,
        "dirty-sync-missed-zero-copy": 0,
        "mbps": counters.mbps,
        "pages-per-second": round(counters.pages_per_s),
        "page-size": TARGET_PAGE_BYTES,
        "multifd-bytes": 0,
        "skipped": 0,
        "precopy-bytes": counters.bytes_by_stage["precopy"],
        "downtime-bytes": counters.bytes_by_stage["downtime"],
        "postcopy-bytes": counters.bytes_by_stage["postcopy"],
        "postcopy-requests": counters.postcopy_requests,
    }
