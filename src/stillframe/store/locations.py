"""Locations of snapshot files: a path of this host, or the URL of an object in a bucket."""

from __future__ import annotations

import os
from pathlib import Path

from stillframe.errors import HostError, NotFoundError, UsageError
from stillframe.still.sinks import Sink, Source
from stillframe.store.backends.bucket import Bucket, is_bucket_url
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource

Location = str | os.PathLike[str]


def open_location(location: Location) -> Source:
    """Open a location for reading.

    Raises:
        NotFoundError: there is nothing. UsageError: not a regular file, or not an object's URL.
        HostError: not permitted, or the bucket cannot be reached.
    """
    text = os.fspath(location)
    if is_bucket_url(text):
        bucket, name = _object(text)
        return bucket.open(name)
    return LocalSource(location)


def _object(url: str) -> tuple[Bucket, str]:
    """Split a URL into bucket and object name. Raises UsageError if it names no object."""
    place, _, name = url.rpartition("/")
    if not name or not place.partition("://")[2]:
        raise UsageError(f"{url} names no object", remedy="write s3://BUCKET/NAME")
    return Bucket(place), name


def open_sink(output: Location | Sink, *, overwrite: bool = False) -> Sink:
    """Return the sink itself, or open one for the file or object of that name.

    Raises:
        UsageError, SinkError: as :class:`LocalSink`; UsageError also for overwriting an object.
        HostError: the bucket cannot be reached.
    """
    if not isinstance(output, str | os.PathLike):
        return output
    text = os.fspath(output)
    if not is_bucket_url(text):
        return LocalSink(output, overwrite=overwrite)
    if overwrite:
        raise UsageError("objects in a bucket are not replaced", remedy="choose another name")
    bucket, name = _object(text)
    try:
        bucket.open(name).close()
    except NotFoundError:
        return bucket.sink(name)
    raise UsageError(f"{text} exists already", remedy="choose another name")


def is_there(location: Location) -> bool:
    """Return whether something exists at the location; True also if access is denied."""
    text = os.fspath(location)
    if not is_bucket_url(text):
        return os.path.lexists(text)
    try:
        open_location(text).close()
    except NotFoundError:
        return False
    except HostError:
        pass
    return True


def absolute(location: Location) -> str:
    """Return the location independent of the working directory; symbolic links stay."""
    text = os.fspath(location)
    return text if is_bucket_url(text) else str(Path(text).absolute())


def real(location: Location) -> str:
    """Return the location with symbolic links resolved."""
    text = os.fspath(location)
    return text if is_bucket_url(text) else os.path.realpath(text)
