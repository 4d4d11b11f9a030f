"""The copying of snapshots to another store: only missing ones, parents first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import msgspec

from stillframe.errors import UsageError
from stillframe.still.sinks import Sink, Source
from stillframe.store.backends.objects import Backend
from stillframe.store.records import Entry, data_key, disks_prefix
from stillframe.store.store import Store
from stillframe.store.wholes import enter_form, read_pointer, whole_key

_PIECE_BYTES = 8 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes copied, bytes in total)."""


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a copy. ``copied``: new in the target, parents first. ``there``: in the target
    already."""

    copied: tuple[Entry, ...]
    there: tuple[Entry, ...]
    copied_bytes: int


def copy_snapshots(
    source: Store,
    target: Store,
    entries: Collection[Entry],
    *,
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> Copied:
    """Copy snapshots together with the parents that they need, their disks and their tags.

    The target's catalog gets each snapshot once all of it is durable there, so a second run after a
    crash copies the rest.

    Args:
        entries: snapshots of ``source``.

    Raises:
        NotFoundError, DataError: a snapshot, a parent or a disk is gone or cannot be read.
        HostError: not permitted, not reachable. SinkError: the target is full or not reachable.
        UsageError: only one of the stores is encrypted, or their keys differ.
    """
    if (source.key and source.key.secret) != (target.key and target.key.secret):
        plain = next((one for one in (source, target) if one.key is None), None)
        raise UsageError(
            f"the stores {source.description} and {target.description} have not the same key",
            why=f"{plain.description} is not encrypted, the other one is" if plain else None,
            remedy="snapshots are copied as they are: take into the other one instead"
            if plain
            else "make the other one with 'stillframe init --keys-of STORE'",
        )
    catalog = source.catalog()
    wanted: dict[str, Entry] = {}
    for entry in entries:
        for one in reversed(catalog.chain(entry)):
            wanted.setdefault(one.id, one)
    known = target.catalog().entries
    there = tuple(entry for entry in wanted.values() if entry.id in known)
    missing = tuple(entry for entry in wanted.values() if entry.id not in known)
    total = sum(catalog.own_bytes(entry) for entry in missing)
    if dry_run:
        return Copied(copied=missing, there=there, copied_bytes=total)
    done = 0

    def step(piece_bytes: int) -> None:
        nonlocal done
        done += piece_bytes
        if on_progress is not None:
            on_progress(done, total)

    for entry in wanted.values():
        if entry.id not in known:
            parent_id = catalog.parent_of(entry)
            parent = None if parent_id is None else target.find(parent_id)
            _copy(source.backend, target, entry, parent, step)
        if tags := catalog.tags.get(entry.id):
            target.tag(target.find(entry.id), add=tags)
    return Copied(copied=missing, there=there, copied_bytes=total)


def _copy(
    source: Backend,
    target: Store,
    entry: Entry,
    parent: Entry | None,
    step: Callable[[int], None],
) -> None:
    with target.target(parent) as place:
        prefix = disks_prefix(entry.name)
        for disk in source.listing(prefix):
            key = disks_prefix(place.name) + disk.key.removeprefix(prefix)
            with contextlib.closing(source.open(disk.key)) as opened:
                sink = target.backend.sink(key)
                _pour(opened, sink, step)
        if (form := read_pointer(source, entry.name)) is not None:
            # Before the increment, whose parent may not exist in the target.
            whole, other = data_key(entry.name), data_key(place.name)
            with contextlib.closing(source.open(whole_key(whole, form.nonce))) as opened:
                _pour(opened, target.backend.sink(whole_key(other, form.nonce)), step)
            enter_form(target.backend, place.name, form)
        with contextlib.closing(source.open(data_key(entry.name))) as opened:
            _pour(opened, place.sink, step)
        place.commit(expected_id=entry.id)


def _pour(source: Source, sink: Sink, step: Callable[[int], None]) -> None:
    try:
        for offset in range(0, source.size_bytes, _PIECE_BYTES):
            piece = source.read_at(offset, min(_PIECE_BYTES, source.size_bytes - offset))
            sink.write(piece)
            step(len(piece))
        sink.commit()
    except BaseException:
        sink.abort()
        raise
