"""A store's objects in a bucket of an object store: S3 and compatibles, Azure, Google Cloud.

obstore (Rust's ``object_store``) signs, retries and uploads in parts, and releases the GIL during
its calls. Credentials come from the environment, under the names that the ecosystem's tools use,
and for S3 also from the AWS command line's profiles.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from stillframe.errors import DataError, UsageError
from stillframe.store.backends.bucket_credentials import profile
from stillframe.store.backends.bucket_errors import translated
from stillframe.store.backends.bucket_sink import BucketSink
from stillframe.store.backends.bucket_source import BucketSource
from stillframe.store.backends.objects import StoredObject

if TYPE_CHECKING:
    from pathlib import Path

SCHEMES: Final = ("s3", "s3a", "az", "azure", "abfs", "abfss", "gs")
RETRIES: Final[dict[str, Any]] = {"max_retries": 10, "retry_timeout": timedelta(seconds=60)}
"""For every request, with growing pauses; a guest that faults on a page waits at most this long."""
_WRITER: Final = "stillframewriter"  # Azure takes identifiers only
_SMALL_MAX_BYTES: Final = 1 << 24


def is_bucket_url(text: str) -> bool:
    """Return whether a store's location is a bucket URL."""
    scheme, found, _ = text.partition("://")
    return bool(found) and scheme in SCHEMES


class Bucket:
    """A prefix in a bucket. See :class:`~stillframe.store.backends.objects.Backend`.

    Args:
        url: ``s3://BUCKET/PREFIX``, ``az://CONTAINER/PREFIX`` or ``gs://BUCKET/PREFIX``.

    Raises:
        UsageError: not such a URL, or the extra ``objects`` is not installed.
        HostError: the credentials are not usable.
    """

    def __init__(self, url: str) -> None:
        if not is_bucket_url(url):
            raise UsageError(
                f"{url} is no place for a store", why=f"known are {', '.join(SCHEMES)}://"
            )
        try:
            import obstore.store
        except ImportError as error:
            raise UsageError(
                f"a store at {url} needs the extra 'objects'",
                remedy="pip install 'stillframe[objects]'",
            ) from error
        self._url = url.rstrip("/")
        self._obstore: Any = obstore
        config, client_options = profile(url)
        with translated("open", self._url):
            self._store: Any = self._obstore.store.from_url(
                self._url, config=config, client_options=client_options, retry_config=RETRIES
            )

    @property
    def description(self) -> str:
        return self._url

    def create(self, key: str, data: bytes) -> bool:
        # The mark tells a conflict from our own earlier write, retried because its reply was lost.
        mark = uuid.uuid4().hex
        with translated("write", self._name(key), writing=True):
            try:
                self._obstore.put(
                    self._store,
                    _checked(key),
                    data,
                    mode="create",
                    use_multipart=False,
                    attributes={_WRITER: mark},
                )
            except self._obstore.exceptions.AlreadyExistsError:
                there = self._obstore.get(self._store, key, options={"head": True})
                return bool(there.attributes.get(_WRITER) == mark)
        return True

    def read(self, key: str) -> bytes:
        with translated("read", self._name(key)):
            there = self._obstore.get(self._store, _checked(key))
            if there.meta["size"] > _SMALL_MAX_BYTES:
                raise DataError(f"{self._name(key)} has {there.meta['size']} bytes")
            return bytes(there.bytes())

    def open(self, key: str) -> BucketSource:
        return BucketSource(self._store, _checked(key), self._name(key))

    def listing(self, prefix: str) -> list[StoredObject]:
        found: list[StoredObject] = []
        # Object stores list by folder only; filter by the rest of the prefix here.
        folder = prefix.rpartition("/")[0]
        with translated("list", self._name(folder)):
            for part in self._obstore.list(self._store, folder or None):
                found += [
                    StoredObject(one["path"], one["size"], one["last_modified"].timestamp())
                    for one in part
                    if one["path"].startswith(prefix)
                ]
        return sorted(found)

    def delete(self, key: str) -> None:
        with translated("remove", self._name(key), writing=True):
            try:
                self._obstore.delete(self._store, _checked(key))
            except FileNotFoundError:
                return

    def sink(self, key: str) -> BucketSink:
        return BucketSink(self._store, _checked(key), self._name(key))

    def path(self, key: str) -> Path | None:
        return None

    def _name(self, key: str) -> str:
        return f"{self._url}/{key}"


def _checked(key: str) -> str:
    if not key or any(not part or part.startswith(".") for part in key.split("/")):
        raise UsageError(f"{key!r} is no object's key")
    return key
