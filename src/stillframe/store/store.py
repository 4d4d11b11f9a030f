"""A store: the snapshots of many VMs in one place, for any number of writers and readers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing

import msgspec

from stillframe.errors import (
    DataError,
    NotFoundError,
    RefusedError,
    SnapshotCancelled,
    StillframeError,
    UsageError,
)
from stillframe.still.container import Container
from stillframe.still.sealing import DataKey
from stillframe.still.sinks import Source
from stillframe.still.snapshot import Snapshot
from stillframe.still.trailer import read_trailer
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.catalog import Catalog, read_catalog
from stillframe.store.compaction import chosen, give_whole_form, nobody_stops
from stillframe.store.keys import not_the_catalogs
from stillframe.store.names import check_tag, resolve
from stillframe.store.records import (
    SNAPSHOTS,
    Config,
    Entry,
    catalog_key,
    data_key,
    name_of,
    tag_key,
)
from stillframe.store.removing import NeededBy, Removal, remove, settle_removals
from stillframe.store.retention import Policy, by_vm, kept_by
from stillframe.store.sealed_backend import SealedBackend, unlock_of
from stillframe.store.wholes import open_form
from stillframe.store.writing import StoreTarget, check_stays


class Compaction(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a compaction. ``compacted``: what has a whole form now, or would have. ``failed``:
    what should have one but does not, by id, and why. ``written_bytes``: size of the whole
    forms."""

    compacted: tuple[Entry, ...] = ()
    failed: dict[str, str] = {}
    written_bytes: int = 0


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a policy. ``kept``: by id, the reasons. ``needed``: what the policy drops but has
    to stay, by id, and who needs it. ``removed``: what is gone, or would be; ``freed_bytes``: its
    size. ``compaction``: the compaction done before."""

    kept: dict[str, str]
    needed: dict[str, str]
    removed: tuple[Entry, ...]
    freed_bytes: int
    compaction: Compaction


def nobody(_entry: Entry) -> str | None:
    """Default for ``needed_by``: no VM needs the snapshot."""
    return None


def _id_of(source: Source) -> str | None:
    try:
        return read_trailer(source)[0].snapshot_id
    except DataError:
        return None


class Store:
    """An open store; it holds nothing to close. Safe to share between threads."""

    def __init__(self, backend: Backend, config: Config, key: DataKey | None = None) -> None:
        """``key``: the data key of an encrypted store."""
        self.backend = backend if key is None else SealedBackend(backend, key)
        self.config = config
        self.key = key

    @property
    def description(self) -> str:
        return self.backend.description

    def catalog(self) -> Catalog:
        """Read all current snapshots and tags.

        Raises:
            HostError: not permitted.
        """
        return read_catalog(self.backend)

    def list(self, vms: Collection[str] = ()) -> Sequence[Entry]:
        """Return the snapshots of these VMs, or of all, oldest first."""
        return [e for e in self.catalog().entries.values() if not vms or e.vm in vms]

    def find(self, name: str) -> Entry:
        """Return the snapshot of a name: id, short id, ``VM@latest``, ``VM@TIME``, ``VM@TAG``.

        Raises:
            NotFoundError: there is none. UsageError: the name is ambiguous.
            DataError: the name goes by time or tag, and a catalog entry is damaged.
        """
        return resolve(self.catalog(), name)

    def location(self, entry: Entry) -> str:
        """Return the path or URL of the snapshot's file."""
        key = data_key(entry.name)
        path = self.backend.path(key)
        return f"{self.description}/{key}" if path is None else str(path)

    def open(self, entry: Entry) -> Snapshot:
        """Open a snapshot together with its parents.

        Raises:
            NotFoundError: a file is gone. DataError: damaged. HostError: not permitted.
        """
        file = open_form(self.backend, entry.name)
        snapshot = Snapshot(file, unlock_of(self.backend), resolve=self._parent_of)
        if snapshot.id != entry.id:
            snapshot.close()
            raise not_the_catalogs(self.location(entry))
        return snapshot

    def _parent_of(self, child: Container) -> Container:
        parent = child.manifest.parent
        assert parent is not None
        try:
            entry = small_objects.read(self.backend, catalog_key(parent.id), Entry)
            return open_form(self.backend, entry.name)
        except (NotFoundError, DataError):
            # Perhaps only the catalog is damaged: the file itself tells its id.
            for one in self.backend.listing(SNAPSHOTS):
                name = name_of(one.key)
                if one.key == data_key(name):
                    with closing(self.backend.open(one.key)) as source:
                        found = _id_of(source) == parent.id
                    if found:
                        return open_form(self.backend, name)
            raise

    def key_for_new(self, given: DataKey | None) -> DataKey | None:
        """Return the key that encrypts a new snapshot.

        Raises:
            UsageError: a key is given, but the store has its own, or is not encrypted.
        """
        if given is not None:
            own = "has its own key" if self.key is not None else "is not encrypted"
            raise UsageError(
                f"the store {self.description} {own}", remedy="leave --encrypt and --recipient out"
            )
        return self.key

    def target(self, parent: Entry | None = None) -> StoreTarget:
        """Return the target of a new snapshot; see :class:`StoreTarget`.

        Raises:
            BusyError: the parent is being removed. SinkError: not permitted, full.
        """
        return StoreTarget(self.backend, parent)

    def tag(self, entry: Entry, add: Collection[str] = (), drop: Collection[str] = ()) -> None:
        """Add and drop tags.

        Raises:
            UsageError: a tag is invalid. RefusedError: tags are to be dropped, but the store is
                append-only.
            BusyError: the snapshot is being removed. SinkError: not permitted.
        """
        for tag in (*add, *drop):
            check_tag(tag)
        if drop:
            self.check_may_remove()
        check_stays(self.backend, entry)
        for tag in add:
            self.backend.create(tag_key(entry.id, tag), b"")
        for tag in drop:
            self.backend.delete(tag_key(entry.id, tag))

    def remove(
        self, entries: Collection[Entry], *, needed_by: NeededBy = nobody, dry_run: bool = False
    ) -> Removal:
        """Remove these snapshots, all or none.

        Args:
            needed_by: who else needs a snapshot, such as a VM that runs from it.

        Raises:
            RefusedError: the store is append-only, or something needs one of them.
            DataError: the catalog is damaged. SinkError: not permitted.
        """
        self.check_may_remove()
        found = remove(self.backend, entries, needed_by, all_or_none=True, dry_run=dry_run)
        if found.kept:
            names = {entry.id: entry.label for entry in entries}
            first, who = next(iter(found.kept.items()))
            raise RefusedError(
                f"snapshot {names[first]} is needed",
                why=f"by {who}",
                remedy="remove that first, or both together",
                guest_state="none",
                reasons=tuple(
                    (names[i], f"needed by {w}", "remove that first") for i, w in found.kept.items()
                ),
            )
        return found

    def prune(
        self,
        policy: Policy,
        *,
        vms: Collection[str] = (),
        needed_by: NeededBy = nobody,
        dry_run: bool = False,
        compacts: bool = True,
    ) -> Pruning:
        """Remove what the policy does not keep, for each VM separately. Before that, compact chains
        and complete the removals of dead processes.

        Args:
            vms: only these VMs; all if empty.
            compacts: whether to compact chains.

        Raises:
            UsageError: the policy would keep nothing of a VM; nothing is removed.
            NotFoundError: there is no snapshot of such a VM. RefusedError: the store is
                append-only. Otherwise as :meth:`remove`.
        """
        policy.check()
        self.check_may_remove()
        if not dry_run:
            settle_removals(self.backend)
        catalog = self.catalog()
        kept, going = self._sorted_out(catalog, policy, vms)
        planned = chosen(catalog, going, vms) if compacts else ()
        done = Compaction(compacted=planned) if dry_run else self._compact(planned)
        removal = remove(
            self.backend,
            going,
            needed_by,
            all_or_none=False,
            dry_run=dry_run,
            planned=planned if dry_run else (),
        )
        return Pruning(
            kept=kept,
            needed=removal.kept,
            removed=removal.removed,
            freed_bytes=removal.freed_bytes,
            compaction=done,
        )

    def compact(
        self,
        policy: Policy | None = None,
        *,
        vms: Collection[str] = (),
        stopped: Callable[[], bool] = nobody_stops,
    ) -> Compaction:
        """Compact chains, so that no snapshot needs more than ``MOST_FILES`` files; ids, names,
        tags and parents stay the same. Does nothing in an append-only store.

        Args:
            policy: choose the whole forms so that what the policy does not keep can go.
            vms: only these VMs' chains; all if empty.
            stopped: polled during the work; True ends it.

        Raises:
            HostError: not permitted. A single snapshot's failure is in the result instead.
        """
        if self.config.append_only:
            return Compaction()
        catalog = self.catalog()
        going = self._sorted_out(catalog, policy, vms)[1] if policy is not None else []
        return self._compact(chosen(catalog, going, vms), stopped)

    def _compact(
        self, planned: Collection[Entry], stopped: Callable[[], bool] = nobody_stops
    ) -> Compaction:
        written: dict[str, int] = {}
        failed: dict[str, str] = {}
        for entry in planned:
            try:
                written[entry.id] = give_whole_form(self, entry, stopped) or 0
            except SnapshotCancelled:
                break
            except StillframeError as error:
                failed[entry.id] = str(error)
        return Compaction(
            compacted=tuple(entry for entry in planned if entry.id in written),
            failed=failed,
            written_bytes=sum(written.values()),
        )

    def _sorted_out(
        self, catalog: Catalog, policy: Policy, vms: Collection[str]
    ) -> tuple[dict[str, str], Sequence[Entry]]:
        """Return what the policy keeps, by id, with the reasons; and what it drops. Raises as
        :meth:`prune`."""
        groups = by_vm(catalog.entries.values())
        for vm in vms:
            if vm not in groups:
                raise NotFoundError(f"the store has no snapshot of a VM {vm!r}")
        kept: dict[str, str] = {}
        going: list[Entry] = []
        for vm, entries in groups.items():
            if vms and vm not in vms:
                continue
            reasons = kept_by(policy, entries, catalog.tags)
            if not reasons:  # a mistyped tag must not cost everything
                raise UsageError(
                    f"nothing of {vm} would be kept",
                    why="no snapshot of it has such a tag",
                    remedy="add --keep-last 1, or remove them with 'stillframe rm'",
                )
            kept |= {one: ", ".join(why) for one, why in reasons.items()}
            going += [entry for entry in entries if entry.id not in reasons]
        return kept, going

    def check_may_remove(self) -> None:
        """Raise RefusedError if the store is append-only."""
        if self.config.append_only:
            raise RefusedError(
                f"the store {self.description} is append-only",
                why="nothing is ever removed from it",
                guest_state="none",
            )
