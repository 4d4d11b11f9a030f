"""What a policy keeps; the cases are those of restic's manual and of its ``snapshot_policy.go``."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

import pytest

from stillframe.errors import UsageError
from stillframe.store.records import Entry
from stillframe.store.retention import Policy, kept_by


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def entries(*moments: str) -> list[Entry]:
    return [
        Entry(id=moment, name=moment, vm="web1", created=moment, file_bytes=1) for moment in moments
    ]


def sundays() -> list[Entry]:
    """One each Sunday, from 2014-09-07 to 2015-01-11 (restic's manual)."""
    first = datetime.datetime(2014, 9, 7, 10, 0, tzinfo=datetime.UTC)
    return entries(*((first + datetime.timedelta(weeks=n)).isoformat() for n in range(19)))


def kept(
    policy: Policy, of: list[Entry], tags: dict[str, tuple[str, ...]] | None = None
) -> list[str]:
    return sorted(one[:16] for one in kept_by(policy, of, tags or {}))


def test_the_last() -> None:
    assert kept(Policy(last=2), sundays()) == ["2015-01-04T10:00", "2015-01-11T10:00"]
    assert len(kept(Policy(last=-1), sundays())) == 19
    assert len(kept(Policy(last=100), sundays())) == 19


def test_days_count_only_where_there_are_snapshots() -> None:
    """``--keep-daily 4`` keeps the last four of one a week."""
    assert kept(Policy(daily=4), sundays()) == [
        "2014-12-21T10:00",
        "2014-12-28T10:00",
        "2015-01-04T10:00",
        "2015-01-11T10:00",
    ]


def test_months_keep_the_last_of_each_and_the_oldest() -> None:
    assert kept(Policy(monthly=12), sundays()) == [
        "2014-09-07T10:00",
        "2014-09-28T10:00",
        "2014-10-26T10:00",
        "2014-11-30T10:00",
        "2014-12-28T10:00",
        "2015-01-11T10:00",
    ]


def test_the_oldest_only_while_there_is_a_count_left() -> None:
    assert kept(Policy(monthly=5), sundays())[0] == "2014-09-28T10:00"


def test_years_and_what_is_within() -> None:
    assert kept(Policy(yearly=1), sundays()) == ["2015-01-11T10:00"]
    assert kept(Policy(yearly=2), sundays()) == ["2014-12-28T10:00", "2015-01-11T10:00"]
    assert kept(Policy(within_s=14 * 86400), sundays()) == [
        "2014-12-28T10:00",
        "2015-01-04T10:00",
        "2015-01-11T10:00",
    ]
    with pytest.raises(UsageError):
        Policy(within_s=-1).check()
    Policy(within_s=1).check()


def test_hours_and_weeks() -> None:
    of = entries(
        "2026-01-01T10:10:00+00:00",
        "2026-01-01T10:50:00+00:00",
        "2026-01-01T11:00:00+00:00",
        "2026-01-05T00:00:00+00:00",
    )
    assert kept(Policy(hourly=2), of) == ["2026-01-01T11:00", "2026-01-05T00:00"]
    assert kept(Policy(hourly=3), of) == ["2026-01-01T10:50", *kept(Policy(hourly=2), of)]
    assert kept(Policy(weekly=2), of) == ["2026-01-01T11:00", "2026-01-05T00:00"]


def test_days_are_those_of_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    of = entries("2026-01-01T23:30:00+00:00", "2026-01-02T00:30:00+00:00")
    assert len(kept(Policy(daily=2), of)) == 2
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    assert kept(Policy(daily=1), of) == ["2026-01-02T00:30"]


def test_tags_are_not_counted() -> None:
    of = sundays()
    tags = {of[3].id: ("release",), of[4].id: ("other",)}
    assert kept(Policy(last=1, tags=("release",)), of, tags) == [
        "2014-09-28T10:00",
        "2015-01-11T10:00",
    ]


def test_reasons() -> None:
    of = entries("2026-01-01T10:10:00+00:00", "2026-01-01T10:50:00+00:00")
    found = kept_by(Policy(last=1, hourly=3, tags=("x", "y")), of, {of[0].id: ("x",)})
    assert found == {of[1].id: ["last", "hourly"], of[0].id: ["tag x", "oldest hourly"]}
