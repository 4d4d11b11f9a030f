"""The keys of an encrypted store: one data key, wrapped separately for each reader.

Each wrapped key is a small object of its own, so that one comes and goes without the others. A
reader whose key is removed may have kept the data key, and can then read data written before and
after.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import msgspec

from stillframe.errors import DataError, NotFoundError, UnreadableError, UsageError
from stillframe.still.sealing import DataKey
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.keys import Keys, Slot, decode_slots
from stillframe.store.records import KEYS, Config


class StoreKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key of a store. ``id``: the slot's id. ``key_id``: id of the wrapped data key. ``label``:
    its user's words."""

    format: Literal[1] = 1
    id: str
    key_id: str
    created: str
    label: str = ""
    slot: Slot


def list_keys(backend: Backend) -> list[StoreKey]:
    """Return all keys, oldest first, without damaged ones, which ``check`` reports.

    Raises:
        UnreadableError: a key cannot be read now. HostError: not permitted.
    """
    found: list[StoreKey] = []
    for one in backend.listing(KEYS):
        try:
            found.append(small_objects.read(backend, one.key, StoreKey))
        except UnreadableError:
            raise
        except (DataError, NotFoundError):
            continue  # damaged, or removed just now; the other keys still open the store
    return sorted(found, key=lambda key: (key.created, key.id))


def write_keys(backend: Backend, key: DataKey, labels: Sequence[str] = ()) -> list[StoreKey]:
    """Write a data key's slots; return them.

    Args:
        labels: labels of the first slots; the others get none.

    Raises:
        SinkError: full, not permitted.
    """
    written = []
    slots = decode_slots(key.slots, backend.description)
    for slot, label in zip_longest(slots, labels[: len(slots)], fillvalue=""):
        assert isinstance(slot, Slot)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        one = StoreKey(
            id=secrets.token_hex(4), key_id=key.id.hex(), created=now, label=label, slot=slot
        )
        backend.create(f"{KEYS}{one.id}.json", small_objects.encoded(one))
        written.append(one)
    return written


def key_with_slots(backend: Backend, key: DataKey) -> tuple[DataKey, list[str]]:
    """Return a store's data key with its slots, for another store, and the slots' labels.

    Raises:
        DataError: a slot is damaged. HostError: not permitted.
    """
    wrapped = [one for one in list_keys(backend) if one.key_id == key.id.hex()]
    slots = msgspec.json.encode([one.slot for one in wrapped])
    return key._replace(slots=slots), [one.label for one in wrapped]


def open_key(backend: Backend, config: Config, keys: Keys | None) -> DataKey | None:
    """Return a store's data key; None if the store is not encrypted.

    Raises:
        LockedError: no given key opens it. DataError: its keys are damaged or gone.
        UsageError: it is not encrypted, though the keys accept only encrypted stores.
    """
    if config.key_id is None:
        if backend.listing(KEYS):
            raise DataError(
                f"the store {backend.description} has keys, but says that it is not encrypted",
                why="somebody changed its configuration",
            )
        if keys is not None and keys.only_encrypted:
            raise UsageError(
                f"the store {backend.description} is not encrypted", remedy="give no key for it"
            )
        return None
    key_id = bytes.fromhex(config.key_id)
    found = list_keys(backend)
    slots = [one.slot for one in found if one.key_id == config.key_id]
    if not slots:
        how = "damaged" if len(backend.listing(KEYS)) > len(found) else "gone"
        raise DataError(
            f"the keys of the store {backend.description} are {how}", remedy="put a copy back"
        )
    where = f"the store {backend.description}"
    opener = keys if keys is not None else Keys()
    key = DataKey(key_id, opener.open(slots, key_id, where))
    opener.add(key._replace(slots=msgspec.json.encode(slots)))
    return key


def remove_key(backend: Backend, key_id: str) -> StoreKey:
    """Remove a key unless it is the last.

    Raises:
        NotFoundError: there is no key of that id. UsageError: it is the last.
        SinkError: not permitted.
    """
    keys = list_keys(backend)
    found = next((key for key in keys if key.id == key_id), None)
    if found is None:
        raise NotFoundError(
            f"the store has no key {key_id}", remedy="'stillframe key ls' lists them"
        )
    if len(keys) == 1:
        raise UsageError(f"{key_id} is the last key", why="nobody could read the store any more")
    backend.delete(f"{KEYS}{key_id}.json")
    return found
