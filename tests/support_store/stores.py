"""Stores of small snapshots, made with the real writer."""

from __future__ import annotations

import secrets
from pathlib import Path

from stillframe.model import CapturedDisk, FrozenFile, MachineRecord, ParentRecord
from stillframe.still.frames import digest_of
from stillframe.still.writer import SnapshotWriter
from stillframe.store import small_objects
from stillframe.store.backends.objects import Backend
from stillframe.store.opening import make_store
from stillframe.store.records import CONFIG, Config, Entry
from stillframe.store.sealed_backend import SealedBackend
from stillframe.store.store import Store
from stillframe.store.writing import StoreTarget
from tests.support_store.small import PAGE, head, manifest, tail, write_ram

BLOCKS = (("ram", 8 * PAGE),)
Ram = dict[tuple[int, int], bytes | None]


def machine(name: str, **fields: object) -> MachineRecord:
    return MachineRecord(
        name=name,
        pid=1,
        uid=0,
        vmm="qemu",
        vmm_version="7.2.0",
        machine_type="pc",
        accelerator="tcg",
        executable="/usr/bin/qemu",
        argv=("qemu",),
        cwd="/",
        guest_state="running",
        vcpus=1,
        **fields,  # type: ignore[arg-type]
    )


def store_on(backend: Backend, **fields: object) -> Store:
    """A new store on a backend."""
    config = Config(id="0" * 32, created="2026-01-01T00:00:00+00:00", **fields)  # type: ignore[arg-type]
    assert backend.create(CONFIG, small_objects.encoded(config))
    return Store(backend, config)


def folder_store(path: Path, **options: object) -> Store:
    return make_store(path, **options)  # type: ignore[arg-type]


def write_into(
    target: StoreTarget,
    *,
    vm: str = "web1",
    created: str = "2026-01-02T03:04:05+00:00",
    parent: Entry | None = None,
    pages: Ram | None = None,
    disk: bytes | None = None,
) -> None:
    """A snapshot's data, without an entry in the catalog: a whole one, or a page over a parent."""
    if pages is None:
        count = 8 if parent is None else 1
        pages = {(0, page): secrets.token_bytes(64) * (PAGE // 64) for page in range(count)}
    captured: tuple[CapturedDisk, ...] = ()
    if disk is not None:
        captured = (_beside(target, disk),)
    key = target._backend.key if isinstance(target._backend, SealedBackend) else None
    with SnapshotWriter(target.sink, key=key, increment=parent is not None) as writer:
        writer.append_stream(head(BLOCKS))
        write_ram(writer, pages, blocks=BLOCKS)
        writer.append_stream(tail())
        writer.finish(
            manifest(
                BLOCKS,
                machine=machine(vm),
                created=created,
                captured_disks=captured,
                parent=None if parent is None else ParentRecord(id=parent.id),
            )
        )


def put(store: Store, *, parent: Entry | None = None, **fields: object) -> Entry:
    """One more snapshot."""
    with store.target(parent) as target:
        write_into(target, parent=parent, **fields)  # type: ignore[arg-type]
        return target.commit()


def _beside(target: StoreTarget, content: bytes) -> CapturedDisk:
    assert target.path is not None
    folder = target.path.with_name(target.path.name + ".disks")
    folder.mkdir(parents=True)
    (folder / "vda-00000000.qcow2").write_bytes(content)
    file = FrozenFile(
        path=f"{folder.name}/vda-00000000.qcow2",
        format="qcow2",
        size_bytes=len(content),
        mtime_ns=0,
        head=digest_of(content[: 1 << 20]).hex(),
        digest=digest_of(content).hex(),
    )
    return CapturedDisk(
        device="vda", qdev="", node_name="", kind="copy", virtual_size_bytes=1 << 20, files=(file,)
    )
