"""The location, making and opening of stores."""

from __future__ import annotations

import datetime
import os
import re
import secrets
from collections.abc import Sequence

from stillframe.errors import DataError, HostError, NotFoundError, UnreadableError, UsageError
from stillframe.still.host_mark import state_directory
from stillframe.still.sealing import DataKey
from stillframe.store import small_objects
from stillframe.store.backends.bucket import Bucket
from stillframe.store.backends.folder import LocalFolder
from stillframe.store.backends.objects import Backend
from stillframe.store.keys import Keys
from stillframe.store.records import (
    CATALOG,
    CONFIG,
    DEFAULT_FULL_EVERY,
    KEYS,
    SNAPSHOTS,
    Config,
)
from stillframe.store.store import Store
from stillframe.store.store_keys import key_with_slots, list_keys, open_key, write_keys

ENVIRONMENT = "STILLFRAME_STORE"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def default_location() -> str:
    """Return ``STILLFRAME_STORE``, else a folder in the user's state directory.

    Raises:
        HostError: there is no home directory.
    """
    return os.environ.get(ENVIRONMENT) or str(state_directory() / "store")


def open_backend(location: str | os.PathLike[str] | None) -> Backend:
    """Return the backend for a path or URL, else for :func:`default_location`; the place need not
    exist.

    Raises:
        UsageError: no backend supports it. HostError: its credentials are not usable.
    """
    text = default_location() if location is None else os.fspath(location)
    scheme = _URL.match(text)
    if scheme is None:
        return LocalFolder(text)
    if scheme[1] == "file":
        return LocalFolder(text.removeprefix("file://"))
    return Bucket(text)


def make_store(
    location: str | os.PathLike[str] | None = None,
    *,
    append_only: bool = False,
    full_every: int | None = None,
    key: DataKey | None = None,
    keys_of: Store | None = None,
) -> Store:
    """Make a store.

    Args:
        location: path or URL; else ``STILLFRAME_STORE``, else a folder in the user's state
            directory.
        append_only: never remove anything from it.
        full_every: the longest chain, base included; the snapshot after that is a full one.
        key: key from ``make_key``; encrypts everything in the store.
        keys_of: encrypt the store with that store's keys, so that snapshots can be copied between
            them.

    Raises:
        UsageError: the place has a store or other objects. SinkError: not permitted.
        HostError: the bucket cannot hold a store, for lack of conditional writes.
    """
    labels: Sequence[str] = ()
    if keys_of is not None:
        if key is not None or keys_of.key is None:
            raise UsageError(f"a key cannot be had of the store {keys_of.description}")
        key, labels = key_with_slots(keys_of.backend, keys_of.key)
    backend = open_backend(location)
    every = DEFAULT_FULL_EVERY if full_every is None else full_every
    config = _new_config(append_only, every, None if key is None else key.id.hex())
    if config.full_every < 1:
        raise UsageError(f"a full snapshot every {full_every} makes no sense")
    others = [one.key for one in backend.listing("")]
    if CONFIG in others:
        raise UsageError(f"{backend.description} is a store already")
    if others:
        raise UsageError(
            f"{backend.description} is not empty", remedy="name an empty or a new folder"
        )
    if key is not None:
        write_keys(backend, key, labels)
    content = small_objects.encoded(config)
    if not backend.create(CONFIG, content):
        raise UsageError(f"{backend.description} is a store already")
    if backend.create(CONFIG, content):
        backend.delete(CONFIG)
        raise HostError(
            f"{backend.description} can be no store",
            why="it writes over an object that it was told to make only once (If-None-Match), so "
            "that one writer's snapshots would hide another's",
            remedy="use an object store with conditional writes, or a folder",
        )
    return Store(backend, config, key)


def read_config(backend: Backend) -> Config:
    """Read a store's configuration.

    Raises:
        NotFoundError: there is no store. DataError: damaged, or of an unknown format.
        HostError: not permitted.
    """
    try:
        return small_objects.read(backend, CONFIG, Config)
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no store at {backend.description}",
            remedy="make one with 'stillframe init', or name another with --store",
        ) from error
    except UnreadableError:
        raise
    except DataError as error:
        raise DataError(
            f"the configuration of the store {backend.description} is damaged",
            why=error.why,
            remedy="'stillframe repair' makes a new one",
        ) from error


def open_store(location: str | os.PathLike[str] | None = None, keys: Keys | None = None) -> Store:
    """Open a store.

    Args:
        location: as for :func:`make_store`.
        keys: open an encrypted store; they keep its key.

    Raises:
        NotFoundError: there is no store. DataError: damaged, or of an unknown format.
        HostError: not permitted. LockedError: it is encrypted, and no given key opens it.
    """
    backend = open_backend(location)
    config = read_config(backend)
    return Store(backend, config, open_key(backend, config, keys))


def repaired_config(
    location: str | os.PathLike[str] | None = None, keys: Keys | None = None
) -> tuple[Store, list[str]]:
    """Open a store, with a new configuration if the old one is damaged or gone.

    Returns:
        The store, and a description of each repair.

    Raises:
        NotFoundError: there is no store. SinkError: not permitted.
        DataError: its keys are damaged or gone. LockedError: no given key opens it.
    """
    try:
        return open_store(location, keys=keys), []
    except UnreadableError:
        raise
    except (DataError, NotFoundError):
        backend = open_backend(location)
        if not backend.listing(SNAPSHOTS) or not backend.listing(CATALOG):
            raise
        if _names_a_key(backend):  # so the keys are damaged, not the configuration
            raise
    try:
        old = backend.read(CONFIG)
    except NotFoundError:
        old = b""
    # If unknown, assume append-only, so that nothing is removed.
    append_only = re.search(rb'"append_only": false', old) is None
    wrapped = list_keys(backend)
    if not wrapped and backend.listing(KEYS):
        raise DataError(f"the keys of the store {backend.description} are damaged")
    config = _new_config(append_only, DEFAULT_FULL_EVERY, wrapped[0].key_id if wrapped else None)
    key = open_key(backend, config, keys)
    backend.delete(CONFIG)
    backend.create(CONFIG, small_objects.encoded(config))
    said = "made a new configuration" + (", append-only to be on the safe side" * append_only)
    return Store(backend, config, key), [said]


def _names_a_key(backend: Backend) -> bool:
    try:
        return small_objects.read(backend, CONFIG, Config).key_id is not None
    except (DataError, NotFoundError):
        return False


def _new_config(append_only: bool, full_every: int, key_id: str | None) -> Config:
    now = datetime.datetime.now(datetime.UTC)
    return Config(
        id=secrets.token_hex(16),
        created=now.isoformat(timespec="seconds"),
        append_only=append_only,
        full_every=full_every,
        key_id=key_id,
    )
