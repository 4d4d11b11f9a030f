"""A filler without any VM: all frames, in the wanted order, each page once and right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import DataError, InternalError
from stillframe.image.filler import Filler
from stillframe.image.ram_image import RamImage
from stillframe.still.snapshot import Snapshot
from tests.support.probes import has_uffd_wp
from tests.support_store.small import PAGE, open_bytes, random_ram, small_file


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    has_uffd_wp().require()
    with open_bytes(small_file(shuffled=True)) as opened:
        yield opened


def _content(image: RamImage, position: int) -> list[bytes]:
    pages = image.blocks[position].used_length_bytes // PAGE
    return [os.pread(image.fds[position], PAGE, page * PAGE) for page in range(pages)]


@pytest.mark.parametrize("working_set", [(), (3, 1), (10**6, -1)])
def test_all_pages_get_there(snapshot: Snapshot, working_set: tuple[int, ...]) -> None:
    image = RamImage.make(snapshot, [2, 0])
    known = [frame for frame in working_set if 0 <= frame < snapshot.index.frame_count]
    filler = Filler(image, working_set=known)
    filler.start([])
    filler.sweep()
    assert filler.wait(60)
    ram = random_ram(1)
    for position, block in enumerate((2, 0)):
        expected = [
            page or bytes(PAGE)
            for (b, _), page in sorted(ram.items(), key=lambda i: i[0])
            if b == block
        ]
        assert _content(image, position) == expected
    data = sum(page is not None for (block, _), page in ram.items() if block in (0, 2))
    assert image.scan() == data, "zero pages take no memory"
    assert not image.incomplete_frames()
    image.close()


@pytest.mark.parametrize("prefetched", [False, True])
def test_the_working_set_comes_before_the_rest_which_comes_in_order(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, prefetched: bool
) -> None:
    image = RamImage.make(snapshot, [0, 2])
    *rest, last_but_one, last = sorted(image.frames())
    working_set = [last, last_but_one]
    assert len(rest) > 1
    choose, chosen = Filler._choose, dict[int, None]()

    def noted(filler: Filler, only_asked: bool) -> int | None:  # called with its lock held
        frame = choose(filler, only_asked)
        if frame is not None:
            chosen.setdefault(frame)
        return frame

    monkeypatch.setattr(Filler, "_choose", noted)
    filler = Filler(image, working_set=working_set)
    filler.sweep()
    if prefetched:
        filler.prefetch()
    filler.start([])
    assert filler.wait(60)
    assert list(chosen) == [*working_set, *rest]
    image.close()


def test_nothing_is_placed_before_its_start(snapshot: Snapshot) -> None:
    image = RamImage.make(snapshot, [0])
    filler = Filler(image, working_set=sorted(image.frames()))
    assert not filler.wait(0.2)
    assert image.scan() == 0
    filler.start([])
    assert filler.wait(60), "the working set is all of it"
    image.close()


def test_what_a_guest_has_written_stays(snapshot: Snapshot) -> None:
    image = RamImage.make(snapshot, [0])
    written = next(
        page for (block, page), content in random_ram(1).items() if content and not block
    )
    os.pwrite(image.fds[0], b"guest", written * PAGE)
    filler = Filler(image)
    filler.start([], taken_over=True)
    filler.sweep()
    assert filler.wait(60)
    assert _content(image, 0)[written].startswith(b"guest")
    image.close()


def test_an_heir_fills_only_what_is_missing(snapshot: Snapshot) -> None:
    image = RamImage.make(snapshot, [0])
    first = Filler(image)
    first.start([])
    first.sweep()
    assert first.wait(60)
    heir = Filler(image)
    heir.start([], taken_over=True)
    assert heir.wait(60)
    assert heir.progress().done == heir.progress().frames
    image.close()


def test_a_damaged_frame_is_an_error(tmp_path: Path) -> None:
    content = bytearray(small_file())
    with open_bytes(bytes(content)) as good:
        frame = next(frame for frame, run in good.index.runs_of_block(0) if run.kind)
        content[good.index.frame(frame).offset_bytes + 20] ^= 1
    with open_bytes(bytes(content)) as snapshot:
        image = RamImage.make(snapshot, [0])
        filler = Filler(image)
        filler.start([])
        filler.sweep()
        with pytest.raises(DataError, match="damaged"):
            filler.wait(60)
        filler.stop()
        assert frame in image.incomplete_frames()
        image.close()


def test_any_other_error_ends_the_wait_as_well(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(*_: object) -> None:
        raise ValueError("a defect of ours")

    monkeypatch.setattr(Filler, "_place", place)
    image = RamImage.make(snapshot, [0])
    filler = Filler(image)
    filler.start([])
    filler.sweep()
    with pytest.raises(InternalError, match="a defect of ours"):
        filler.wait(60)
    filler.stop()
    image.close()
