"""The stream for a VM that maps an image."""

from __future__ import annotations

import io
from collections.abc import Collection

import pytest

from stillframe.errors import DataError
from stillframe.image import small_stream as module
from stillframe.image.small_stream import small_stream
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Description, Device, Event, Pages, RamBlocks, ZeroRun
from tests.support_store.small import PAGE, open_bytes, random_ram, small_file


def _events(mapped: Collection[int], *, shuffled: bool) -> list[Event]:
    with open_bytes(small_file(shuffled=shuffled)) as snapshot:
        stream = b"".join(small_stream(snapshot, mapped))
    return list(StreamReader(io.BytesIO(stream)).events())


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("mapped", [(), (0,), (0, 2), (0, 1, 2)])
def test_it_has_all_but_the_mapped_pages(mapped: tuple[int, ...], shuffled: bool) -> None:
    events = _events(mapped, shuffled=shuffled)
    pages: dict[tuple[int, int], bytes | None] = {}
    for event in events:
        if isinstance(event, ZeroRun):
            for number in range(event.pages):
                pages[event.block_index, event.offset_bytes // PAGE + number] = None
        elif isinstance(event, Pages):
            for at in range(0, len(event.data), PAGE):
                page = event.data[at : at + PAGE]
                pages[event.block_index, (event.offset_bytes + at) // PAGE] = page
    assert pages == {place: page for place, page in random_ram(1).items() if place[0] not in mapped}
    whole = _events((), shuffled=False)
    for kind in (RamBlocks, Device, Description):
        assert [e for e in events if isinstance(e, kind)] == [
            e for e in whole if isinstance(e, kind)
        ]


def test_frames_of_mapped_blocks_are_not_read() -> None:
    with open_bytes(small_file()) as snapshot:
        read: list[int] = []
        whole = snapshot.container.read_frame
        snapshot.container.read_frame = lambda n: (read.append(n), whole(n))[1]  # type: ignore[method-assign]
        b"".join(small_stream(snapshot, {0, 1, 2}))
        assert sorted(read) == snapshot.index.frames_without_runs()
        assert len(read) < snapshot.index.frame_count


def test_there_is_a_limit_to_what_is_not_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes take no room in a file, and all of it is held in memory."""
    monkeypatch.setattr(module, "_OUTSIDE_LIMIT_BYTES", 100)
    with open_bytes(small_file()) as snapshot, pytest.raises(DataError, match="outside of RAM"):
        b"".join(small_stream(snapshot, {0, 1, 2}))
