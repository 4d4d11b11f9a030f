"""A snapshot's recorded point in time."""

from __future__ import annotations

import datetime
from typing import Final

from stillframe.errors import DataError

_FIRST_YEAR: Final = 1970
_LAST_YEAR: Final = 9998
"""The limits keep it representable in every time zone."""


def instant_of(created: str) -> datetime.datetime:
    """Return the point in time that ``created`` names, in UTC; without a zone, it is UTC.

    Raises:
        DataError: not a time.
    """
    try:
        moment = datetime.datetime.fromisoformat(created)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        moment = moment.astimezone(datetime.UTC)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{created!r:.80} is no time", why=str(error)[:80]) from error
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise DataError(f"{created!r:.80} cannot be when a snapshot was taken")
    return moment
