"""The stream for a VM that maps an image: the snapshot's, without the pages of the image's blocks.

Head, block list, devices and description stay as they are: the list names every block, and QEMU's
loader accepts missing pages (``migration/ram.c``, ``ram_load_precopy``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from stillframe.errors import DataError
from stillframe.model import TARGET_PAGE_BYTES, BlockRecord
from stillframe.still.frames import BytesLike
from stillframe.still.index import KIND_DATA, PageRun
from stillframe.still.records import check_run, is_ram_section, payload_start, read_section_id
from stillframe.still.snapshot import Snapshot
from stillframe.vmstate.page_records import page_records, zero_records
from stillframe.vmstate.writer import ram_part_prefix, ram_part_suffix

_OUTSIDE_LIMIT_BYTES = 256 << 20
"""An honest stream's device sections and description have at most 128 MiB (``vmstate/reader.py``);
but a frame of zeroes is small, however much it holds."""


def small_stream(
    snapshot: Snapshot,
    mapped: Collection[int],
    *,
    edit: Callable[[bytes], bytes] = lambda piece: piece,
) -> Iterator[bytes]:
    """Yield the stream piece by piece; only the frames that it needs are read and verified.

    Args:
        mapped: numbers of the blocks whose pages are left out.
        edit: gets each piece outside of RAM, and may change it.

    Raises:
        DataError: the snapshot is damaged.
    """
    index, outside_bytes = snapshot.index, 0
    runs_of: dict[int, list[PageRun]] = {}
    for number in range(len(snapshot.blocks)):
        if number not in mapped:
            for frame, run in index.runs_of_block(number):
                runs_of.setdefault(frame, []).append(run)
    frames = sorted({*index.frames_without_runs(), *runs_of})
    for frame, raw in snapshot.container.iter_frames(frames):
        if frame in runs_of:
            section_id = read_section_id(raw)
            yield from part_of_runs(snapshot.blocks, section_id, raw, runs_of[frame])
        elif not is_ram_section(raw, index.target_page_bytes):
            outside_bytes += len(raw)
            if outside_bytes > _OUTSIDE_LIMIT_BYTES:
                raise DataError(
                    f"the stream has more than {_OUTSIDE_LIMIT_BYTES >> 20} MiB outside of RAM"
                )
            yield edit(raw)


def part_of_runs(
    blocks: Sequence[BlockRecord], section_id: int, raw: BytesLike, runs: Sequence[PageRun]
) -> Iterator[bytes]:
    """Yield a ``ram`` section with some of another section's runs.

    Raises:
        DataError: they are not in ``raw``.
    """
    yield ram_part_prefix(section_id)
    for run in runs:
        idstr = blocks[run.block].idstr
        offset = run.first_page * TARGET_PAGE_BYTES
        if run.kind != KIND_DATA:
            yield zero_records(offset, run.pages, block=idstr)
            continue
        end = check_run(raw, run, idstr, TARGET_PAGE_BYTES)
        start = payload_start(raw, run, idstr, TARGET_PAGE_BYTES)
        first = raw[start : start + TARGET_PAGE_BYTES]
        yield page_records(offset, bytes(first), block=idstr)
        # A run's later records never name the block.
        yield bytes(raw[start + TARGET_PAGE_BYTES : end])
    yield ram_part_suffix(section_id)
