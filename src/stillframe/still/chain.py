"""A chain of snapshots read as one: an increment over its parents, down to a full snapshot.

The index is assembled from the files' indexes alone, newest first, so a page costs one lookup and
one read of one file, however deep the chain is. Frames keep their content in the files. Read
through the chain, a frame is a whole RAM section with only those of its pages that count, so code
that reads the frames of a single file can read a chain.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec

from stillframe.errors import DataError, NotFoundError
from stillframe.still.container import Container
from stillframe.still.frame_reader import FrameReader
from stillframe.still.frames import digest_of
from stillframe.still.index import (
    KIND_DATA,
    BlockEntry,
    Columns,
    Index,
    empty_columns,
)
from stillframe.still.index_builder import visible_pieces
from stillframe.still.ram_section import RamSection
from stillframe.still.records import PREFIX_BYTES, check_run, payload_start, record_bytes
from stillframe.still.sealing import Unlock
from stillframe.still.sinks import Source
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.writer import ram_part_suffix

MOST_PARTS: Final = 1024
HEAD_FRAME: Final = 1
"""In an increment, frame 0 is the preamble that marks it as one, and this frame is the stream's
head."""

Resolve = Callable[[Container], Source | Container]
"""Finds the file of the parent that an open increment names (``manifest.parent``), opened or not;
raises NotFoundError."""


def no_parents(child: Container) -> Source:
    """A ``Resolve`` that knows no parents."""
    assert child.manifest.parent is not None
    raise NotFoundError(
        f"{child.source.description} is an increment, and its parent {child.manifest.parent.id} is"
        " not given"
    )


class _Piece(NamedTuple):
    """``pages`` pages that count, starting ``skip`` pages into a run (a row of its part's
    columns)."""

    part: int
    row: int
    block: int
    skip: int
    pages: int


_Row = tuple[int, int, int, int, int, int]
"""A row of the index, in its order: block, first page, pages, frame, offset in the frame, kind."""


class _Origin(NamedTuple):
    """Where a frame comes from. ``pieces``: what counts in it, in its order; None: all of it,
    unchanged."""

    part: int
    frame: int
    pieces: list[_Piece] | None


class Chain(FrameReader):
    """An increment and all its parents.

    Args:
        top: the increment; owned from here on, also if this raises.
        resolve: finds the parents.
        unlock: gives the keys of encrypted parents.
        like: the same chain, already open, whose index is reused.

    ``parts``: the files, newest first.

    Raises:
        NotFoundError: a parent is missing.
        LockedError: a parent is encrypted, and there is no key, or another one.
        DataError: a file is damaged or not the named parent, or no file has one of the pages.
    """

    def __init__(
        self,
        top: Container,
        resolve: Resolve,
        unlock: Unlock | None = None,
        *,
        like: FrameReader | None = None,
    ) -> None:
        super().__init__()
        self.parts: list[Container] = [top]
        self.source, self.id, self.place = top.source, top.id, top.place
        try:
            while (parent := self.parts[-1].manifest.parent) is not None:
                if len(self.parts) == MOST_PARTS:
                    raise DataError(f"the chain has more than {MOST_PARTS} snapshots")
                found = resolve(self.parts[-1])
                if not isinstance(found, Container):
                    found = Container(found, unlock)
                self.parts.append(found)
                if found.id != parent.id:
                    raise DataError(
                        f"{found.source.description} is not the parent of "
                        f"{self.parts[-2].source.description}",
                        why=f"its id is {found.id}, the parent's is {parent.id}",
                    )
                if found.index.target_page_bytes != top.index.target_page_bytes:
                    raise DataError("the snapshots of a chain have pages of different sizes")
            if top.index.frame_count <= HEAD_FRAME:
                raise DataError(f"{top.source.description} has no head")
            self._section_id, self._footers = _ram_section(top.read_frame(HEAD_FRAME))
            suffix = ram_part_suffix(self._section_id, footer=self._footers)
            self._suffix_bytes = len(suffix)
            read = [part.content_id for part in self.parts]
            self._origins: list[_Origin] = []
            if isinstance(like, Chain) and read == [part.content_id for part in like.parts]:
                self._origins, self.index = like._origins, like.index
            else:
                self.index = self._assemble()
                self._check_complete()
            stand_ins = any(part.stands_in for part in self.parts)
            self.content_id = digest_of("".join(read).encode()).hex() if stand_ins else self.id
        except BaseException:
            self.close()
            raise
        self.manifest = msgspec.structs.replace(top.manifest, stream_bytes=self.index.stream_bytes)

    @property
    def may_lack_pages(self) -> bool:
        return any(part.may_lack_pages for part in self.parts)

    def close(self) -> None:
        """Close all files."""
        for part in self.parts:
            part.close()

    def was_taken_here(self) -> bool:
        """Return whether the newest file has this user's mark, and each parent's whole form, too.
        The mark covers the parent's id, thus all of the parent except a whole form read in its
        place."""
        first, *rest = self.parts
        return first.was_taken_here() and all(
            part.was_taken_here() for part in rest if part.stands_in
        )

    def read_stored(self, number: int) -> bytes:
        origin = self._origins[number]
        return self.parts[origin.part].read_stored(origin.frame)

    def read_frame(self, number: int) -> bytes:
        part, frame, pieces = self._origins[number]
        raw = self.parts[part].read_frame(frame)
        return raw if pieces is None else self._rewritten(raw, frame, pieces)

    def part_of(self, number: int) -> int:
        """Return the position in ``parts`` of the file that a frame is in."""
        return self._origins[number].part

    def needs(self, snapshot_id: str, frame: int) -> bool:
        """Return whether anything in that frame of that snapshot counts."""
        parts = [part.id for part in self.parts]
        return any(
            parts[origin.part] == snapshot_id and origin.frame == frame for origin in self._origins
        )

    def check_rest(self) -> None:
        live = {(origin.part, origin.frame) for origin in self._origins}
        for number, part in enumerate(self.parts):
            part.check_rest()
            for frame in range(part.index.frame_count):
                if (number, frame) not in live:
                    part.read_stored(frame)

    def at_frame(self, number: int, error: DataError) -> DataError:
        origin = self._origins[number]
        return self.parts[origin.part].at_frame(origin.frame, error)

    def new_section(self) -> RamSection:
        """Return an empty RAM section of the newest snapshot's stream."""
        page_bytes = self.parts[0].index.target_page_bytes
        return RamSection(self._section_id, footer=self._footers, page_bytes=page_bytes)

    def _rewritten(self, raw: bytes, frame: int, pieces: list[_Piece]) -> bytes:
        """Return a RAM section with only these pages, after checking them against the index."""
        part = self.parts[pieces[0].part]
        page_bytes = part.index.target_page_bytes
        section = self.new_section()
        view = memoryview(raw)
        for piece in pieces:
            idstr = self.index.blocks[piece.block].idstr
            run = part.index.run(piece.block, piece.row)
            try:
                check_run(raw, run, idstr, page_bytes)
                start = payload_start(raw, run, idstr, page_bytes)
            except DataError as error:
                raise part.at_frame(frame, error) from error
            content = view[start + piece.skip * record_bytes(KIND_DATA, page_bytes) :]
            section.add(
                piece.block,
                idstr,
                run.first_page + piece.skip,
                piece.pages,
                content if run.kind == KIND_DATA else None,
            )
        return section.finish()

    # The chain's index

    def _assemble(self) -> Index:
        top = self.parts[0]
        by_frame: dict[tuple[int, int], list[_Piece]] = {}
        frames_of = [part.index.columns.frame for part in self.parts]
        for piece in self._pieces():
            frame = frames_of[piece.part][piece.row]
            by_frame.setdefault((-piece.part, frame), []).append(piece)  # the oldest part first
        rest = [n for n in top.index.frames_without_runs() if n > HEAD_FRAME]
        self._origins = [_Origin(0, HEAD_FRAME, None)]
        rows: list[_Row] = []
        lengths: list[int] = [top.index.frame(HEAD_FRAME).raw_bytes]
        for (part, frame), pieces in sorted(by_frame.items()):
            columns = self.parts[-part].index.columns
            if len(pieces) > 1:
                pieces.sort(key=lambda p: (columns.raw_offset[p.row], p.skip))
            lengths.append(self._place(len(self._origins), columns, pieces, rows))
            self._origins.append(_Origin(-part, frame, pieces))
        self._origins += [_Origin(0, frame, None) for frame in rest]
        lengths += [top.index.frame(frame).raw_bytes for frame in rest]
        frames = [self.parts[o.part].index.frame(o.frame) for o in self._origins]
        rows.sort()
        return Index(
            target_page_bytes=top.index.target_page_bytes,
            blocks=_entries(top.index, rows),
            raw_bytes=array("I", lengths),
            stored_bytes=array("I", [frame.stored_bytes for frame in frames]),
            digests=b"".join(frame.digest for frame in frames),
            columns=Columns(
                array("Q", [row[1] for row in rows]),
                array("I", [row[2] for row in rows]),
                array("I", [row[3] for row in rows]),
                array("I", [row[4] for row in rows]),
                array("B", [row[5] for row in rows]),
            ),
        )

    def _place(self, number: int, columns: Columns, pieces: list[_Piece], rows: list[_Row]) -> int:
        """Append the rows of the pieces in the frame that :meth:`_rewritten` makes; return its
        length."""
        index = self.parts[0].index
        page_bytes = index.target_page_bytes
        at, last = PREFIX_BYTES, -1
        for _, row, block, skip, pages in pieces:
            kind = columns.kind[row]
            rows.append((block, columns.first_page[row] + skip, pages, number, at, kind))
            at += pages * record_bytes(kind, page_bytes)
            if last != block:
                at += 1 + len(index.blocks[block].idstr)
            last = block
        return at + self._suffix_bytes

    def _pieces(self) -> Iterator[_Piece]:
        """Yield what counts in all parts' runs: of each page, the newest. Blocks are matched by
        name; pages beyond a block's present end are dropped."""
        page_bytes = self.parts[0].index.target_page_bytes
        for number, block in enumerate(self.parts[0].index.blocks):
            columns, sources = empty_columns(), array("Q")
            for part in range(len(self.parts) - 1, -1, -1):
                index = self.parts[part].index
                entry = next((b for b in index.blocks if b.idstr == block.idstr), None)
                if entry is not None:
                    first, end = entry.first_run, entry.end_run
                    columns.first_page.extend(index.columns.first_page[first:end])
                    columns.pages.extend(index.columns.pages[first:end])
                    sources.extend(range(part << 32 | first, part << 32 | end))
            order = sorted(range(len(sources)), key=columns.first_page.__getitem__)
            starts = array("Q", [columns.first_page[i] for i in order])
            pages = array("I", [columns.pages[i] for i in order])
            age = [sources[i] >> 32 for i in order]  # the smaller, the newer
            end = -(-block.used_length_bytes // page_bytes)
            for i, skip, count in visible_pieces(starts, pages, age):
                count = min(count, end - min(end, starts[i] + skip))
                if count:
                    row = sources[order[i]] & 0xFFFFFFFF
                    yield _Piece(age[i], row, number, skip, count)

    def _check_complete(self) -> None:
        if self.may_lack_pages:
            return
        for number, block in enumerate(self.index.blocks):
            missing = -(-block.used_length_bytes // self.index.target_page_bytes)
            missing -= sum(self.index.page_counts(number))
            if missing:
                raise DataError(
                    f"{missing} pages of block {block.idstr!r} are neither in "
                    f"{self.source.description} nor in its parents"
                )


def _entries(top: Index, rows: list[_Row]) -> list[BlockEntry]:
    counts = [0] * len(top.blocks)
    for number, *_ in rows:
        counts[number] += 1
    entries: list[BlockEntry] = []
    first = 0
    for block, count in zip(top.blocks, counts, strict=True):
        entries.append(block._replace(first_run=first, end_run=first + count))
        first += count
    return entries


def _ram_section(head: bytes) -> tuple[int, bool]:
    """Return the id of the RAM section that a stream's head starts, and whether sections have
    footers."""
    reader = StreamReader(io.BytesIO(head))
    try:
        for _ in reader.events():
            if reader.footers is not None:
                break
    except DataError:
        if reader.footers is None:  # else it is just the end of the head
            raise
    if reader.footers is None:
        raise DataError("an increment's head has no RAM section")
    return reader.ram_section_id, reader.footers
