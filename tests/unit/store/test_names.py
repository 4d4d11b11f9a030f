"""What the names of snapshots mean."""

from __future__ import annotations

import datetime

import msgspec
import pytest

from stillframe.errors import DataError, NotFoundError, UsageError
from stillframe.store.catalog import Catalog
from stillframe.store.names import end_of, is_name, resolve
from stillframe.store.records import Entry


def entry(digits: str, created: str, vm: str = "web1") -> Entry:
    return Entry(id=digits.ljust(64, "0"), name=digits, vm=vm, created=created, file_bytes=1)


OLD = entry("aaaa1", "2026-11-22T23:59:59.900+00:00")
MORNING = entry("aaaa2", "2026-11-23T10:00:42.500+00:00")
NOON = entry("bbbb1", "2026-11-23T12:00:00+00:00")
OTHER = entry("cccc1", "2026-11-23T13:00:00+00:00", vm="db@home")


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture
def catalog() -> Catalog:
    entries = {one.id: one for one in (OLD, MORNING, NOON, OTHER)}
    tags = {OLD.id: ("nightly",), MORNING.id: ("nightly", "before-upgrade")}
    return Catalog(entries=entries, tags=tags, damaged={})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (OLD.id, OLD),
        ("aaaa2", MORNING),
        ("bbbb", NOON),
        ("latest", OTHER),
        ("web1@latest", NOON),
        ("db@home@latest", OTHER),
        ("web1@before-upgrade", MORNING),
        ("web1@nightly", MORNING),
        ("web1@2026-11-23T10:00", MORNING),
        ("web1@2026-11-23 10:00:42", MORNING),
        ("web1@2026-11-23T10:00:41", OLD),
        ("web1@2026-11-23T09:59", OLD),
        ("web1@2026-11-23T10", MORNING),
        ("web1@2026-11-23T12:00Z", NOON),
        ("web1@2026-11-23T14:00+02:00", NOON),
        ("web1@2026-11-22", OLD),
        ("web1@2027-01-01", NOON),
    ],
)
def test_resolves(catalog: Catalog, name: str, meant: Entry) -> None:
    assert is_name(name)
    assert resolve(catalog, name) == meant


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("aaaa", UsageError, "several"),
        ("dddd", NotFoundError, "no snapshot dddd"),
        ("web2@latest", NotFoundError, "db@home, web1"),
        ("web1@2026-11-21", NotFoundError, "the oldest of web1"),
        ("web1@2026-13-45", UsageError, "no time"),
        ("web1@weekly", NotFoundError, "weekly"),
        ("@latest", NotFoundError, "''"),
        ("web1@", NotFoundError, "web1@"),
        ("web1@9999-12-31", UsageError, "no time"),
    ],
)
def test_says_why_not(catalog: Catalog, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(catalog, name)


def test_in_an_empty_store() -> None:
    nothing = Catalog(entries={}, tags={}, damaged={})
    for name in ("latest", "web1@latest", "aaaa"):
        with pytest.raises(NotFoundError):
            resolve(nothing, name)


@pytest.mark.parametrize(
    "text", ["a.still", "/x/web1@latest", "web1", "aaa", "AAAA", "dir/aaaa", ""]
)
def test_what_is_a_file(text: str) -> None:
    assert not is_name(text)


@pytest.mark.parametrize(
    ("moment", "end"),
    [
        ("2026-11-23", "2026-11-23T23:00:00+00:00"),
        ("2026-03-29", "2026-03-29T22:00:00+00:00"),  # of 23 hours
        ("2026-03-29T01", "2026-03-29T01:00:00+00:00"),
        ("2026-03-29T02", "2026-03-29T01:00:00+00:00"),  # there is none
        ("2026-10-25", "2026-10-25T23:00:00+00:00"),  # of 25
        ("2026-10-25T02", "2026-10-25T02:00:00+00:00"),  # comes twice
        ("2026-10-25T02:30", "2026-10-25T01:31:00+00:00"),
        ("2026-10-25T02:30+02:00", "2026-10-25T00:31:00+00:00"),
    ],
)
def test_local_time(monkeypatch: pytest.MonkeyPatch, moment: str, end: str) -> None:
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert end_of(moment).astimezone(datetime.UTC).isoformat() == end
    finally:
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()


def test_the_newest_may_be_the_damaged_one(catalog: Catalog) -> None:
    of_id = "dddd1".ljust(64, "0")
    damaged = msgspec.structs.replace(catalog, damaged={of_id: DataError("rot")})
    for name in ("latest", "web1@latest", "web1@2026-11-23", "web1@nightly", "web2@latest"):
        with pytest.raises(DataError, match="dddd1000 is damaged"):
            resolve(damaged, name)
    assert resolve(damaged, "bbbb") == NOON
