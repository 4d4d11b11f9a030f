"""Pages get into an image's file; those that are there, whoever put them there, stay."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from stillframe.image.ram_image import ImageFiles
from stillframe.model import BlockRecord
from tests.support.probes import has_uffd_wp

PAGE, PAGES = 4096, 128
HEADER = 8


@pytest.fixture
def image() -> Iterator[ImageFiles]:
    has_uffd_wp().require()
    block = BlockRecord(idstr="ram", used_length_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    image = ImageFiles.make_files([block], [0])
    yield image
    image.close()


def content(page: int) -> bytes:
    return page.to_bytes(8, "little") * (PAGE // 8)


def records(first: int, count: int) -> bytes:
    """As in a stream: each page behind a header."""
    return b"".join(bytes(HEADER) + content(page) for page in range(first, first + count))


@pytest.mark.parametrize("known", [(), (0,), (15, 16), (20, 21, 22), (49,), tuple(range(50))])
@pytest.mark.parametrize("unseen", [(), (0,), (1, 15), (16, 17), (31, 48, 49)])
def test_what_is_there_stays(
    image: ImageFiles, known: tuple[int, ...], unseen: tuple[int, ...]
) -> None:
    """Placed by us before, and by somebody whom we took over from."""
    (pages,), (fd,) = image.pages, image.fds
    for page in known:
        assert pages.place(10 + page, 1, b"k" * PAGE, 0, PAGE) == 1
    for page in set(unseen) - set(known):
        os.pwrite(fd, b"u" * PAGE, (10 + page) * PAGE)
    there = set(known) | set(unseen)
    assert pages.place(10, 50, records(10, 50), HEADER, HEADER + PAGE) == 50 - len(there)
    assert pages.all_there(10, 50)
    assert pages.place(10, 50, records(10, 50), HEADER, HEADER + PAGE) == 0
    for page in range(PAGES):
        number = page - 10
        wanted = content(page) if 0 <= number < 50 else bytes(PAGE)
        wanted = b"k" * PAGE if number in known else wanted
        wanted = b"u" * PAGE if number in set(unseen) - set(known) else wanted
        assert os.pread(fd, PAGE, page * PAGE) == wanted


def test_what_has_no_place_is_told(image: ImageFiles) -> None:
    (pages,) = image.pages
    with pytest.raises(ValueError, match="beyond the end"):
        pages.place(PAGES - 1, 2, records(0, 2), HEADER, HEADER + PAGE)
    image.close()  # its mapping is gone
    assert pages.place(3, 2, records(3, 2), HEADER, HEADER + PAGE) in (-errno.EBADF, -errno.ENOENT)
    assert not pages.all_there(3, 1)
