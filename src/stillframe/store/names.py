"""Names of snapshots: an id, the start of one, ``VM@TIME``, ``VM@TAG``, ``VM@latest``."""

from __future__ import annotations

import datetime
import re

from stillframe.errors import DataError, NotFoundError, UsageError
from stillframe.store.catalog import Catalog
from stillframe.store.records import Entry

SHORTEST_ID = 4
LATEST = "latest"
_ID = re.compile(rf"[0-9a-f]{{{SHORTEST_ID},64}}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ](?P<hour>\d\d)(?P<minute>:\d\d(?P<second>:\d\d(?:\.\d+)?)?)?)?"
    r"(?P<zone>Z|[+-]\d\d:\d\d)?"
)


def is_name(text: str) -> bool:
    """Return whether the text can name a snapshot of a store, rather than a file."""
    return "/" not in text and (text == LATEST or "@" in text or _ID.fullmatch(text) is not None)


def check_tag(tag: str) -> str:
    """Return the tag if it is valid.

    Raises:
        UsageError: it is not.
    """
    if _TAG.fullmatch(tag) is None or tag == LATEST or _TIME.fullmatch(tag):
        raise UsageError(
            f"{tag!r} cannot be a tag",
            remedy="use letters, digits and _.+-, at most 64, and no time and not 'latest'",
        )
    return tag


def resolve(catalog: Catalog, name: str) -> Entry:
    """Return the snapshot of that name.

    Raises:
        NotFoundError: there is none. UsageError: the name is ambiguous.
        DataError: the name goes by time or tag, and a catalog entry is damaged.
    """
    if catalog.damaged and (name == LATEST or "@" in name):
        one = next(iter(catalog.damaged))
        raise DataError(
            f"it cannot be told which snapshot {name} is",
            why=f"the catalog's entry of snapshot {one[:8]} is damaged",
            remedy="run 'stillframe repair', or name one by its id",
        )
    if name == LATEST:
        return _newest(list(catalog.entries.values()), name, "the store is empty")
    vm, at, moment = name.rpartition("@")
    if not at:
        return _by_id(catalog, name)
    of_vm = [entry for entry in catalog.entries.values() if entry.vm == vm]
    if not of_vm:
        known = ", ".join(sorted({entry.vm for entry in catalog.entries.values()}))
        raise NotFoundError(
            f"the store has no snapshot of a VM {vm!r}",
            remedy=f"it has some of {known}" if known else "it is empty",
        )
    if moment == LATEST:
        return of_vm[-1]
    if _TIME.fullmatch(moment):
        end = end_of(moment)
        return _newest(
            [entry for entry in of_vm if entry.time < end],
            name,
            f"the oldest of {vm} is of {of_vm[0].created}",
        )
    tagged = [entry for entry in of_vm if moment in catalog.tags.get(entry.id, ())]
    return _newest(tagged, name, "'stillframe ls' shows times and tags")


def _newest(entries: list[Entry], name: str, remedy: str) -> Entry:
    if not entries:
        raise NotFoundError(f"the store has no snapshot {name}", remedy=remedy)
    return entries[-1]


def _by_id(catalog: Catalog, name: str) -> Entry:
    found = [e for e in catalog.entries.values() if e.id.startswith(name)]
    if not found or not _ID.fullmatch(name):
        raise NotFoundError(
            f"the store has no snapshot {name}", remedy="'stillframe ls' shows their ids"
        )
    if len(found) > 1:
        raise UsageError(
            f"several snapshots have ids that begin with {name}",
            remedy="give more of it: " + ", ".join(entry.id[:16] for entry in found[:8]),
        )
    return found[0]


def end_of(moment: str) -> datetime.datetime:
    """Return the end of the named day, hour, minute or second, in UTC; ``moment`` is local time
    unless it has a zone.

    Raises:
        UsageError: not a valid time.
    """
    parts = _TIME.fullmatch(moment)
    try:
        if parts is None:
            raise ValueError("not a time")
        length = datetime.timedelta(seconds=1 if parts["second"] else 60)
        if parts["minute"] is None:
            length = datetime.timedelta(hours=1) if parts["hour"] else datetime.timedelta(days=1)
        last = datetime.datetime.fromisoformat(moment) + length - datetime.timedelta.resolution
        if last.tzinfo is None:
            # DST may change in between; an hour that occurs twice ends with its second occurrence.
            last = datetime.datetime.fromtimestamp(last.replace(fold=1).timestamp(), datetime.UTC)
        return last + datetime.timedelta.resolution
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{moment!r} is no time", why=str(error), remedy="write 2026-11-23T10:00"
        ) from error
