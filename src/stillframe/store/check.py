"""The check of a store: what is damaged or missing, and which snapshots that affects."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import msgspec
from blake3 import blake3

from stillframe.errors import (
    DataError,
    HostError,
    NotFoundError,
    StillframeError,
    UnreadableError,
    UsageError,
)
from stillframe.model import FrozenFile
from stillframe.still.chain import Chain
from stillframe.still.container import Container
from stillframe.still.frames import digest_of
from stillframe.still.sinks import Source
from stillframe.still.snapshot import Snapshot
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend, StoredObject
from stillframe.store.catalog import read_catalog
from stillframe.store.records import (
    CATALOG,
    CONFIG,
    KEYS,
    PENDING,
    REMOVING,
    SNAPSHOTS,
    TAGS,
    Entry,
    catalog_key,
    data_key,
    entry_of,
    name_of,
    own_disks,
)
from stillframe.store.sealed_backend import open_stored, unlock_of
from stillframe.store.store_keys import StoreKey
from stillframe.store.wholes import nonce_of, open_form, pointer_key, read_pointer, whole_key
from stillframe.store.workers import read_note, read_notes

Progress = Callable[[int, int], None]
Kind = Literal["lost", "catalog", "whole", "orphan", "leftover", "stray"]
_HEAD_BYTES = 1 << 20
_READ_BYTES = 1 << 22


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A defect of the store.

    ``kind``: ``lost``: the object's content is gone, and the snapshots in ``affects`` cannot be
    restored as they were. ``catalog``: only the catalog is wrong, nothing is lost. ``whole``: only
    a whole form is damaged, nothing is lost, but its snapshot cannot be read until it is repaired.
    ``orphan``: data of a snapshot that is not in the catalog. ``leftover``: an object of a dead
    process. ``stray``: an object that is not ours. ``key``: the object. ``affects``: ids of the
    affected snapshots, including those that build on them.
    """

    kind: Kind
    key: str
    what: str
    affects: tuple[str, ...] = ()


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a check. ``snapshots``: how many were checked. ``read_bytes``: how much data was
    read. ``labels``: the affected snapshots' names in messages, by id."""

    snapshots: int
    read_bytes: int
    findings: tuple[Finding, ...]
    labels: dict[str, str]

    @property
    def lost(self) -> dict[str, list[str]]:
        """The snapshots that have lost something, by id, each with what it lost."""
        found: dict[str, list[str]] = {}
        for finding in self.findings:
            for one in finding.affects if finding.kind == "lost" else ():
                found.setdefault(one, []).append(f"{finding.key}: {finding.what}")
        return found

    @property
    def is_sound(self) -> bool:
        """Whether there are no findings but leftovers and stray objects."""
        return not any(
            finding.kind in ("lost", "catalog", "whole", "orphan") for finding in self.findings
        )


def check_store(
    backend: Backend, *, read_data: float = 0.0, progress: Progress | None = None
) -> CheckReport:
    """Check structure, digests, chains and leftovers. Changes nothing; the store may be in use.

    Args:
        read_data: share of the data to read, 0 to 1, chosen at random; indexes and manifests are
            always read.
        progress: called with (bytes done, bytes in total).

    Raises:
        UsageError: ``read_data`` is out of range. HostError: not permitted, or the place is gone.
    """
    check_share(read_data)
    return _Check(backend, read_data, progress).run()


def check_share(read_data: float) -> None:
    """Raise UsageError if ``read_data`` is not between 0 and 1."""
    if not 0 <= read_data <= 1:
        raise UsageError(f"{read_data:.0%} of the data makes no sense")


def damage(error: StillframeError) -> str:
    """Return the description of a damage.

    Raises:
        HostError: the object could not be read, so whether it is damaged is unknown.
    """
    if isinstance(error, UnreadableError):
        raise HostError(
            error.what,
            why=error.why,
            remedy="try again when it can be read; what its medium has lost for good, delete first",
        ) from error
    return str(error)


class _Check:
    def __init__(self, backend: Backend, read_data: float, progress: Progress | None) -> None:
        self._backend = backend
        self._read_data = read_data
        self._progress = progress
        self._findings: list[Finding] = []
        self._random = random.Random()
        self._done_bytes = self._read_bytes = 0

    def run(self) -> CheckReport:
        backend = self._backend
        # In this order: a writer leaves its note, then objects, then the entry, then drops the
        # note.
        self._objects = {one.key: one for one in backend.listing("")}
        pending, removing = (read_notes(backend, prefix) for prefix in (PENDING, REMOVING))
        busy = {note.name for note in (*pending, *removing) if not note.worker.is_gone}
        self._at_work = {note.about for note in pending if not note.worker.is_gone}
        dead = {note.name: PENDING for note in pending if note.worker.is_gone}
        dead |= {note.name: REMOVING for note in removing if note.worker.is_gone}
        catalog = self._catalog = read_catalog(backend)
        self._total_bytes = sum(catalog.own_bytes(one) for one in catalog.entries.values())
        for entry in catalog.entries.values():
            if entry.name not in busy:
                self._check_entry(entry)
            self._check_parents(entry)
        named = {entry.name for entry in catalog.entries.values()}
        named |= self._check_damaged_entries(named | busy)
        for key in self._objects:
            self._check_object(key, named, busy, dead)
        labels = {one: one[:8] for one in catalog.damaged}
        labels |= {one.id: one.label for one in catalog.entries.values()}
        return CheckReport(
            snapshots=len(catalog.entries),
            read_bytes=self._read_bytes,
            findings=tuple(self._findings),
            labels={i: labels[i] for f in self._findings for i in f.affects},
        )

    def _find(self, kind: Kind, key: str, what: str, entry: Entry | None = None) -> None:
        affects = () if entry is None else (entry.id, *sorted(self._catalog.family_of(entry.id)))
        self._findings.append(Finding(kind=kind, key=key, what=what, affects=affects))

    def _check_entry(self, entry: Entry) -> None:
        key = data_key(entry.name)
        try:
            with open_stored(self._backend, key) as file:
                if file.id != entry.id:
                    raise DataError(f"it is snapshot {file.id}, not {entry.id}")
                if entry_of(file, entry.name) != entry:
                    self._find(
                        "catalog", catalog_key(entry.id), "it does not say what the snapshot says"
                    )
                if not self._check_whole_form(entry):
                    self._check_frames(entry, file, key)
                disks = own_disks(file.manifest, entry.name)
        except (NotFoundError, DataError) as error:
            if self._backend.listing(catalog_key(entry.id)):  # else it was removed meanwhile
                self._find("lost", key, damage(error), entry)
            self._step(self._catalog.own_bytes(entry))
            return
        for disk_key, disk in disks:
            self._check_disk(entry, disk_key, disk)

    def _check_whole_form(self, entry: Entry) -> bool:
        """Check the whole form; return whether there is one (the increment's pages are unused
        then)."""
        if entry.name not in self._catalog.wholes or entry.parent is None:
            return False
        key = pointer_key(data_key(entry.name))
        try:
            form = read_pointer(self._backend, entry.name)
            if form is None:
                return False
            key = whole_key(data_key(entry.name), form.nonce)
            with open_form(self._backend, entry.name) as file:
                if form.id != entry.id or not file.stands_in:
                    raise DataError("it is not there" if form.id == entry.id else "another's")
                self._step(entry.file_bytes)
                self._check_frames(entry, file, key)
        except (NotFoundError, DataError) as error:
            self._find_whole_form(
                key, damage(error), entry, sorted(self._catalog.family_of(entry.id))
            )
        return True

    def _find_whole_form(self, key: str, what: str, entry: Entry, family: Collection[str]) -> None:
        """Report a damaged whole form: ``whole`` while the increment and its parents exist, else
        ``lost``."""
        without = msgspec.structs.replace(
            self._catalog,
            wholes={name: one for name, one in self._catalog.wholes.items() if name != entry.name},
        )
        try:
            without.chain(entry)
        except (NotFoundError, DataError):
            affects = (entry.id, *family)
            self._findings.append(Finding(kind="lost", key=key, what=what, affects=affects))
            return
        what += "; the increment and its parents are there"
        self._findings.append(Finding(kind="whole", key=key, what=what))

    def _check_frames(self, entry: Entry, file: Container, key: str) -> None:
        try:
            file.check_rest()  # the seek table, which only other programs need
        except DataError as error:
            self._find_damage(entry, file, key, damage(error), [])
        for number in range(file.index.frame_count):
            stored_bytes = file.index.frame(number).stored_bytes
            if self._is_chosen():
                self._read_bytes += stored_bytes
                try:
                    file.read_stored(number)
                except DataError as error:
                    self._find_damage(entry, file, key, damage(error), self._needing(entry, number))
            self._step(stored_bytes)

    def _find_damage(
        self, entry: Entry, file: Container, key: str, what: str, needing: Sequence[str]
    ) -> None:
        if file.stands_in:
            self._find_whole_form(key, what, entry, needing)
        else:
            affects = (entry.id, *needing)
            self._findings.append(Finding(kind="lost", key=key, what=what, affects=affects))

    def _needing(self, entry: Entry, frame: int) -> list[str]:
        """Return the ids of the snapshots that build on ``entry`` and need this frame of it."""
        return [
            one
            for one in sorted(self._catalog.family_of(entry.id))
            if self._needs(self._catalog.entries[one], entry.id, frame)
        ]

    def _needs(self, child: Entry, snapshot_id: str, frame: int) -> bool:
        try:
            file = open_form(self._backend, child.name)
            with Snapshot(file, unlock_of(self._backend), resolve=self._parent_of) as snapshot:
                chain = snapshot.container
                return not isinstance(chain, Chain) or chain.needs(snapshot_id, frame)
        except (NotFoundError, DataError) as error:
            damage(error)
            return True

    def _parent_of(self, child: Container) -> Container:
        parent = child.manifest.parent
        if parent is None or parent.id not in self._catalog.entries:
            raise NotFoundError("the parent is not in the store")
        return open_form(self._backend, self._catalog.entries[parent.id].name)

    def _check_disk(self, entry: Entry, key: str, file: FrozenFile) -> None:
        try:
            source = self._backend.open(key)
            try:
                why = self._why_another(source, file)
            finally:
                source.close()
        except (NotFoundError, DataError) as error:
            why = damage(error)
        if why is not None:
            self._find("lost", key, why, entry)
        self._step(file.size_bytes)

    def _why_another(self, source: Source, file: FrozenFile) -> str | None:
        if source.size_bytes != file.size_bytes:
            return f"it has {source.size_bytes} bytes, and had {file.size_bytes}"
        head = source.read_at(0, min(_HEAD_BYTES, file.size_bytes))
        if digest_of(head).hex() != file.head:
            return "its first MiB is another one"
        if file.digest and self._is_chosen():
            self._read_bytes += file.size_bytes
            hasher = blake3()
            for at in range(0, file.size_bytes, _READ_BYTES):
                hasher.update(source.read_at(at, min(_READ_BYTES, file.size_bytes - at)))
            if hasher.hexdigest() != file.digest:
                return "its digest is another one"
        return None

    def _check_damaged_entries(self, known: set[str]) -> set[str]:
        """Report each damaged entry, and whether its snapshot is intact; return the names of the
        intact snapshots."""
        damaged = self._catalog.damaged
        whole: dict[str, str] = {}
        parents: dict[str, str] = {}
        for name in {name_of(key) for key in self._objects} - known - {""} if damaged else ():
            try:
                with open_stored(self._backend, data_key(name)) as file:
                    whole[file.id] = name
                    if file.manifest.parent is not None:
                        parents[file.id] = file.manifest.parent.id
            except (NotFoundError, DataError) as error:
                damage(error)
        there = {*self._catalog.entries, *whole}
        while gone := {one for one in whole if parents.get(one, one) not in there}:
            there -= gone
            whole = {one: name for one, name in whole.items() if one not in gone}
        for snapshot_id, why in damaged.items():
            key, what = catalog_key(snapshot_id), damage(why)
            if snapshot_id in whole:
                self._find("catalog", key, f"{what}; the snapshot itself is whole")
            else:
                what += ", and so is the snapshot, or it is gone, or its parent"
                affects = (snapshot_id, *sorted(self._catalog.family_of(snapshot_id)))
                self._findings.append(Finding(kind="lost", key=key, what=what, affects=affects))
        return {whole[one] for one in damaged if one in whole}

    def _check_parents(self, entry: Entry) -> None:
        parent = self._catalog.parent_of(entry)
        if parent is None:
            return
        try:
            self._catalog.chain(entry)
        except DataError as error:
            self._find("lost", catalog_key(entry.id), damage(error), entry)
        except NotFoundError:
            known = (*self._catalog.entries, *self._catalog.damaged)
            # Removal takes children first: while the child exists, its parent was not removed.
            if parent not in known and self._backend.listing(catalog_key(entry.id)):
                self._find("lost", catalog_key(parent), "the parent is not in the store", entry)

    def _check_object(
        self, key: str, named: set[str], busy: set[str], dead: dict[str, str]
    ) -> None:
        if key.startswith(KEYS):
            try:
                small_objects.read(self._backend, key, StoreKey)
            except DataError as error:
                self._find(
                    "catalog", key, f"whose key it was cannot open the store: {damage(error)}"
                )
            except NotFoundError:
                pass  # removed meanwhile
            return
        if key == CONFIG or key.startswith(CATALOG):
            return
        if key.startswith((PENDING, REMOVING)):
            note = read_note(key)
            if note is None:
                self._find("stray", key, "no note of a store")
            elif note.worker.is_gone:
                doing = "took" if key.startswith(PENDING) else "removed"
                self._find("leftover", key, f"of a process that {doing} the snapshot, and died")
            return
        if key.startswith(TAGS):
            snapshot_id = key.removeprefix(TAGS).partition("-")[0]
            if snapshot_id not in {*self._catalog.entries, *self._catalog.damaged}:
                self._find("leftover", key, "a tag of a snapshot that is not in the store")
            return
        name = name_of(key)
        if not key.startswith(SNAPSHOTS) or not name:
            self._find("stray", key, "no object of a store")
        elif name in named and (nonce := nonce_of(key)) and name not in self._at_work:
            self._check_whole_data(key, name, nonce)
        elif name not in named | busy and self._backend.listing(key):
            if data_key(name) in self._objects and dead.get(name) != REMOVING:
                if key == data_key(name):
                    self._find("orphan", key, _describe(self._backend, self._objects[key]))
            else:
                self._find("leftover", key, "of a snapshot that is not in the store")

    def _check_whole_data(self, key: str, name: str, nonce: str) -> None:
        """Report whole-form data that the pointer does not name."""
        with contextlib.suppress(DataError):  # reported already
            form = read_pointer(self._backend, name)
            if (form is None or form.nonce != nonce) and self._backend.listing(key):
                self._find("leftover", key, "of a compaction that died")

    def _is_chosen(self) -> bool:
        return self._random.random() < self._read_data

    def _step(self, done_bytes: int) -> None:
        self._done_bytes += done_bytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)


def _describe(backend: Backend, found: StoredObject) -> str:
    """Return a description of an orphan."""
    try:
        with open_stored(backend, found.key) as file:
            entry = entry_of(file, name_of(found.key))
            return f"snapshot {entry.label} is whole, and not in the catalog"
    except HostError:
        raise
    except StillframeError as error:
        return f"not in the catalog, and no whole snapshot: {damage(error)}"
