"""Chains of small snapshots, made with the real writer, and the RAM that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.model import ParentRecord
from stillframe.still.container import Container
from stillframe.still.host_mark import HostKey
from stillframe.still.sealing import DataKey, unlock_with
from stillframe.still.sinks import Source
from stillframe.still.snapshot import Snapshot
from stillframe.still.writer import SnapshotWriter
from tests.support_store.memory import MemorySink, MemorySource
from tests.support_store.small import BLOCKS, head, manifest, tail, write_ram

Ram = dict[tuple[int, int], bytes | None]
Blocks = Sequence[tuple[str, int]]


class MadeChain:
    """Files of a chain, the base first. ``ids``: of each."""

    def __init__(self, *, parent_path: str = "/gone/parent.still") -> None:
        self._parent_path = parent_path
        self.keys: list[DataKey | None] = []
        self.contents: list[bytes] = []
        self.ids: list[str] = []

    def add(
        self,
        ram: Ram,
        *,
        blocks: Blocks = BLOCKS,
        order: Sequence[tuple[int, int]] | None = None,
        pages_per_frame: int = 20,
        payload: bytes = b"state of a device",
        key: DataKey | None = None,
        here: bool = False,
        **fields: object,
    ) -> None:
        """One more file; the first is whole. ``here``: with the mark of this host."""
        sink = MemorySink()
        parent = ParentRecord(id=self.ids[-1], path=self._parent_path) if self.ids else None
        with SnapshotWriter(sink, key=key, increment=parent is not None) as writer:
            writer.append_stream(head(blocks))
            write_ram(writer, ram, order=order, blocks=blocks, pages_per_frame=pages_per_frame)
            writer.append_stream(tail(payload))
            mark = HostKey.load_or_make() if here else None
            self.ids.append(writer.finish(manifest(blocks, parent=parent, **fields), key=mark))
        self.contents.append(sink.content)
        self.keys.append(key)

    def resolve(self, child: Container) -> Source:
        assert child.manifest.parent is not None
        return MemorySource(self.contents[self.ids.index(child.manifest.parent.id)])

    def open(self, *, resolve: Callable[[Container], Source] | None = None) -> Snapshot:
        """The newest, with its parents and all keys."""
        unlock = unlock_with({key.id: key.secret for key in self.keys if key is not None})
        source = MemorySource(self.contents[-1])
        return Snapshot(source, unlock, resolve=resolve or self.resolve)


def ram_of(snapshot: Snapshot) -> Ram:
    """All pages, as block by block in order of the file."""
    return {
        (number, page): content
        for number, block in enumerate(snapshot.blocks)
        for page, content in snapshot.iter_pages(block.idstr)
    }
