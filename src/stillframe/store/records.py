"""The records in a store's small objects, and the names of its objects (store-format.md)."""

from __future__ import annotations

import datetime
import secrets
from typing import Literal

import msgspec

from stillframe.model import FrozenFile, MachineRecord, Manifest
from stillframe.still.container import Container
from stillframe.still.instant import instant_of

FORMAT = 1
CONFIG = "config"
SNAPSHOTS, CATALOG, TAGS = "snapshots/", "catalog/", "tags/"
PENDING, REMOVING = "pending/", "removing/"
KEYS = "keys/"
_STILL, _DISKS = ".still", ".disks/"
SHORT_ID_DIGITS = 8
DEFAULT_FULL_EVERY = 32


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A store's configuration. ``id``: the store's id. ``append_only``: nothing is ever removed.
    ``full_every``: the longest chain that ``take`` makes; the next snapshot is a full one.
    ``key_id``: id of an encrypted store's data key, 32 hexadecimal digits."""

    format: Literal[1] = 1
    id: str
    created: str
    append_only: bool = False
    full_every: int = DEFAULT_FULL_EVERY
    key_id: str | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot in the catalog. All fields can be derived from the snapshot's own file.

    ``name``: name of its objects (see :func:`data_key`). ``vm``: the machine's name. ``created``:
    its point in time, RFC 3339, UTC. ``parent``: id of the snapshot that it builds on.
    ``file_bytes``: size of its file; ``disks_bytes``: of the disks stored beside it.
    """

    format: Literal[1] = 1
    id: str
    name: str
    vm: str
    created: str
    parent: str | None = None
    file_bytes: int
    disks_bytes: int = 0
    ram_bytes: int = 0
    mode: str = "background"
    for_analysis: bool = False

    @property
    def short_id(self) -> str:
        return self.id[:SHORT_ID_DIGITS]

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.short_id} ({self.vm}, {self.created[:19]}Z)"

    @property
    def own_bytes(self) -> int:
        """Size of its file and disks, without a whole form."""
        return self.file_bytes + self.disks_bytes

    @property
    def time(self) -> datetime.datetime:
        """Its point in time, UTC. Raises DataError if ``created`` is not a time."""
        return instant_of(self.created)


def new_name() -> str:
    """Return a name for a new snapshot's objects. It is chosen before the first write: an object
    store needs it when the upload starts, and the file, whose id is not known yet, records the
    disks beside it."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}"


def data_key(name: str) -> str:
    """Return the key of the snapshot's file; the keys of all its objects begin with it."""
    return f"{SNAPSHOTS}{name}{_STILL}"


def disks_prefix(name: str) -> str:
    """Return the key prefix of the snapshot's disks."""
    return f"{data_key(name)}{_DISKS}"


def name_of(key: str) -> str:
    """Return the name of the snapshot that an object below ``snapshots/`` belongs to; empty if
    none."""
    name, still, rest = key.removeprefix(SNAPSHOTS).partition(_STILL)
    ours = key.startswith(SNAPSHOTS) and still and rest[:1] in ("", ".") and "/" not in name
    return name if ours else ""


def catalog_key(snapshot_id: str) -> str:
    return f"{CATALOG}{snapshot_id}.json"


def tag_key(snapshot_id: str, tag: str) -> str:
    """Return a tag's key. It is flat, so that no folder has to be made and removed."""
    return f"{TAGS}{snapshot_id}-{tag}"


def entry_of(file: Container, name: str) -> Entry:
    """Return the catalog entry for a snapshot's file."""
    manifest, machine = file.manifest, file.manifest.machine
    return Entry(
        id=file.id,
        name=name,
        vm=manifest.mode if machine is None else vm_name(machine),
        created=manifest.created,
        parent=None if manifest.parent is None else manifest.parent.id,
        file_bytes=file.source.size_bytes,
        disks_bytes=sum(file.size_bytes for _, file in own_disks(manifest, name)),
        ram_bytes=sum(block.used_length_bytes for block in manifest.blocks),
        mode=manifest.mode,
        for_analysis=manifest.for_analysis,
    )


def own_disks(manifest: Manifest, name: str) -> list[tuple[str, FrozenFile]]:
    """Return the captured disks' files that are stored beside the snapshot, each with its key. The
    key has the snapshot's present name; after a copy, the file records another one."""
    return [
        (f"{disks_prefix(name)}{file.name_beside}", file)
        for disk in manifest.captured_disks
        for file in disk.files
        if disk.kind == "copy" and file.name_beside
    ]


def vm_name(machine: MachineRecord) -> str:
    """Return a VM's name in the store."""
    return machine.name or f"{machine.vmm}-{machine.pid}"
