"""An open snapshot: manifest, RAM pages, stream, verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

from stillframe.errors import DataError, NotFoundError, RefusedError, UsageError
from stillframe.model import FOR_ANALYSIS, BlockRecord, Manifest
from stillframe.still.chain import Chain, Resolve, no_parents
from stillframe.still.container import Container
from stillframe.still.frame_reader import FrameReader
from stillframe.still.index import KIND_DATA, Index, PageRun
from stillframe.still.records import check_run, payload_start, read_page, record_bytes
from stillframe.still.sealing import DataKey, Unlock
from stillframe.still.sinks import Source
from stillframe.still.skeleton import Skeleton, read_skeleton
from stillframe.still.verify import VerifyReport, verify_container


class Snapshot:
    """A snapshot file, open for reading. Safe to share between threads.

    An increment is read with its parents: its pages, stream and index are those of a full snapshot.

    Pages are target pages (``manifest.target_page_bytes``). Use it as a context manager, or call
    :meth:`close`.
    """

    def __init__(
        self,
        source: Source | Container,
        unlock: Unlock | None = None,
        *,
        resolve: Resolve = no_parents,
        like: Snapshot | None = None,
    ) -> None:
        """Open a snapshot from a source, or an opened file, and own it from here on.

        Args:
            unlock: gives the data keys of encrypted files.
            resolve: finds the parents of an increment.
            like: the same snapshot, already open: its chain's index is reused.

        Raises:
            DataError: not a snapshot, damaged, or of an unknown version.
            NotFoundError: a parent is missing.
            LockedError: it or a parent is encrypted, and there is no key, or another one.
        """
        container = source if isinstance(source, Container) else Container(source, unlock)
        self.container: FrameReader = container
        if container.manifest.parent is not None:
            known = None if like is None else like.container
            self.container = Chain(container, resolve, unlock, like=known)
        self._numbers = {entry.idstr: n for n, entry in enumerate(self.index.blocks)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and its parents'."""
        self.container.close()

    @property
    def id(self) -> str:
        """The content id, 64 hexadecimal digits (docs/reference/file-format.md)."""
        return self.container.id

    @property
    def content_id(self) -> str:
        """Id of the frames that are read; it differs from the id if a whole form is read."""
        return self.container.content_id

    @property
    def manifest(self) -> Manifest:
        return self.container.manifest

    @property
    def files(self) -> tuple[Container, ...]:
        """Its files: one, or those of the increment and all its parents, newest first."""
        one = self.container
        if isinstance(one, Chain):
            return tuple(one.parts)
        assert isinstance(one, Container)
        return (one,)

    @property
    def index(self) -> Index:
        return self.container.index

    @property
    def blocks(self) -> tuple[BlockRecord, ...]:
        """The RAM blocks, in the index's order."""
        return self.manifest.blocks

    @property
    def file_bytes(self) -> int:
        """Length of the file, without its parents'."""
        return self.container.source.size_bytes

    @property
    def is_encrypted(self) -> bool:
        """Whether it and all its parents are encrypted."""
        return all(file.secret is not None for file in self.files)

    @property
    def secrets(self) -> dict[bytes, bytes]:
        """The data keys of its encrypted files, by the keys' ids."""
        return {file.key_id: file.secret for file in self.files if file.secret is not None}

    @property
    def data_key(self) -> DataKey | None:
        """The file's own data key, with the file's slots, for a copy that opens the same way."""
        file = self.files[0]
        return None if file.secret is None else DataKey(file.key_id, file.secret, file.slots)

    @property
    def description(self) -> str:
        """Its name in messages: its path."""
        return self.container.place

    @property
    def owner_uid(self) -> int | None:
        """User id of the file's owner; None if it is not a file."""
        return self.container.source.owner_uid

    @property
    def others_may_write(self) -> bool:
        """Whether its mode lets users other than the owner change the file."""
        return self.container.source.others_may_write

    @property
    def was_taken_here(self) -> bool:
        """Whether it carries the mark of this user on this host (still/host_mark.py)."""
        return self.container.was_taken_here()

    def block_number(self, block: str) -> int:
        """Return the number of a block in :attr:`blocks`.

        Raises:
            NotFoundError: there is no block of this name.
        """
        try:
            return self._numbers[block]
        except KeyError:
            names = ", ".join(self._numbers) or "none"
            raise NotFoundError(
                f"the snapshot has no RAM block {block!r}", remedy=f"its blocks are: {names}"
            ) from None

    def read_page(self, block: str, page: int) -> bytes:
        """Return the content of one page.

        Raises:
            NotFoundError: no such block, or the file does not hold this page.
            DataError: the file is damaged.
        """
        number = self.block_number(block)
        location = self.index.lookup(number, page) if page >= 0 else None
        if location is None:
            raise NotFoundError(f"the snapshot does not hold page {page} of block {block!r}")
        page_bytes = self.index.target_page_bytes
        if location.run.kind != KIND_DATA:
            return bytes(page_bytes)
        raw = self.container.cached_frame(location.frame)
        try:
            content = read_page(raw, location.run, location.position, block, page_bytes)
        except DataError as error:
            raise self.container.at_frame(location.frame, error) from error
        return bytes(page_bytes) if content is None else content

    def read_range(self, block: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Return bytes of a block, from any offset.

        Raises:
            UsageError: the range leaves the block.
            NotFoundError: no such block, or the file does not hold all pages of the range.
            DataError: the file is damaged.
        """
        size = self.blocks[self.block_number(block)].used_length_bytes
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > size:
            raise UsageError(
                f"bytes {offset_bytes} to {offset_bytes + length_bytes} are not in block {block!r}",
                why=f"it has {size} bytes",
            )
        page_bytes = self.index.target_page_bytes
        first, skip = divmod(offset_bytes, page_bytes)
        end = -(-(offset_bytes + length_bytes) // page_bytes) if length_bytes else first
        content = b"".join(self.read_page(block, page) for page in range(first, end))
        return content[skip : skip + length_bytes]

    def iter_runs(
        self, block: str, *, wanted: Callable[[PageRun], bool] = lambda run: True
    ) -> Iterator[tuple[PageRun, memoryview | None]]:
        """Yield all pages of a block, run by run in file order; each frame is read once.

        Yields (run, content); the content is None for zero pages, else page records of
        ``records.record_bytes`` each, whose first ``target_page_bytes`` are the page.

        Args:
            wanted: returns whether to read a run.

        Raises:
            NotFoundError: no such block.
            DataError: the file is damaged.
        """
        number = self.block_number(block)
        by_frame: dict[int, list[PageRun]] = {}
        for frame, run in self.index.runs_of_block(number):
            if not wanted(run):
                continue
            if run.kind == KIND_DATA:
                by_frame.setdefault(frame, []).append(run)
            else:
                yield run, None
        for frame, raw in self.container.iter_frames(sorted(by_frame)):
            for run in by_frame[frame]:
                yield run, self._content(frame, raw, run, block)

    def run_content(self, frame: int, run: PageRun, block: str) -> memoryview:
        """Return the content of one run of data pages, as :meth:`iter_runs` yields it.

        Args:
            frame: number of its frame in the index.

        Raises:
            DataError: the file is damaged.
        """
        return self._content(frame, self.container.cached_frame(frame), run, block)

    def _content(self, frame: int, raw: bytes, run: PageRun, block: str) -> memoryview:
        page_bytes = self.index.target_page_bytes
        try:
            end = check_run(raw, run, block, page_bytes)
            start = payload_start(raw, run, block, page_bytes)
        except DataError as error:
            raise self.container.at_frame(frame, error) from error
        return memoryview(raw)[start:end]

    def iter_pages(self, block: str) -> Iterator[tuple[int, bytes | None]]:
        """Yield (page number, content) of all pages of a block; a zero page's content is None.

        In file order, zero pages first; each frame is read once.

        Raises:
            NotFoundError: no such block.
            DataError: the file is damaged.
        """
        page_bytes = self.index.target_page_bytes
        stride = record_bytes(KIND_DATA, page_bytes)
        for run, content in self.iter_runs(block):
            for position in range(run.pages):
                start = position * stride
                page = None if content is None else bytes(content[start : start + page_bytes])
                yield run.first_page + position, page

    def iter_stream(self) -> Iterator[bytes]:
        """Yield QEMU's migration stream piece by piece; digests and checksums are checked.

        Raises:
            DataError: the file is damaged; the pieces yielded before are sound.
        """
        for _, raw in self.container.iter_frames(range(self.index.frame_count)):
            yield raw

    def check_restorable(self) -> None:
        """Raise RefusedError if the snapshot holds RAM only."""
        if self.manifest.for_analysis:
            raise RefusedError(
                "the snapshot is no whole VM",
                why=FOR_ANALYSIS,
                remedy="export it as raw, or read its pages",
                guest_state="none",
            )

    def skeleton(self) -> Skeleton:
        """Return configuration, device sections and description: the stream without its pages.

        Raises:
            DataError: the file is damaged.
        """
        return read_skeleton(self.container)

    def verify(
        self, *, deep: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Check the file; see :func:`stillframe.still.verify.verify_container`."""
        return verify_container(self.container, deep=deep, progress=progress)
