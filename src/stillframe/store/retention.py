"""Which snapshots a policy keeps, by the rules of restic's ``forget`` (``snapshot_policy.go``)."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Sequence

import msgspec

from stillframe.errors import UsageError
from stillframe.store.records import Entry


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How many snapshots to keep of each kind; -1 means all. ``last``: the newest. ``hourly`` and
    so on: the newest snapshot of each of the last so many hours that have one. ``within_s``: all
    that are at most so many seconds older than the newest. ``tags``: all with one of these tags."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_s: float = 0.0
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError if the policy would keep nothing, or a count is invalid."""
        counts = [self.last, *(getattr(self, name) for name in _BUCKETS)]
        if min(counts) < -1:
            raise UsageError(f"keeping {min(counts)} snapshots makes no sense", remedy="-1 is all")
        if not self.within_s >= 0:
            raise UsageError(f"keeping {self.within_s} seconds makes no sense")
        if not any(counts) and not self.within_s and not self.tags:
            raise UsageError(
                "nothing says what to keep, so nothing is removed",
                remedy="give at least one --keep-... option",
            )


_BUCKETS: dict[str, Callable[[datetime.datetime], object]] = {
    "hourly": lambda moment: (moment.date(), moment.hour),
    "daily": lambda moment: moment.date(),
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}


def kept_by(
    policy: Policy, entries: Sequence[Entry], tags: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Return which of one VM's snapshots are kept, by id, each with the reasons.

    While a bucket has a count left, the oldest snapshot is kept for it, too. Hours and days are
    local time.
    """
    newest_first = sorted(entries, key=lambda one: (one.time, one.id), reverse=True)
    kept: dict[str, list[str]] = {}
    for entry in newest_first:
        if found := set(policy.tags) & set(tags.get(entry.id, ())):
            kept.setdefault(entry.id, []).append(f"tag {', '.join(sorted(found))}")
    for entry in newest_first[: policy.last if policy.last >= 0 else None]:
        kept.setdefault(entry.id, []).append("last")
    for entry in newest_first if policy.within_s else ():
        if (newest_first[0].time - entry.time).total_seconds() <= policy.within_s:
            kept.setdefault(entry.id, []).append("within")
    for name, bucket_of in _BUCKETS.items():
        left, last = getattr(policy, name), None
        for entry in newest_first:
            bucket = bucket_of(entry.time.astimezone())
            oldest = entry is newest_first[-1]
            if left == 0 or (bucket == last and not oldest):
                continue
            reason = f"oldest {name}" if bucket == last else name
            kept.setdefault(entry.id, []).append(reason)
            last, left = bucket, left - 1 if left > 0 else left
    return kept


def by_vm(entries: Collection[Entry]) -> dict[str, list[Entry]]:
    """Group snapshots by VM, in their order."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.vm, []).append(entry)
    return found
