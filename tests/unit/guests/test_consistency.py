"""The checker of the guest's pages, with made-up snapshots, sound and torn."""

from __future__ import annotations

import random
import struct

import pytest

from guests.consistency import check_pages, guest_pages, page_content

PAGES = 40


def snapshot(edge: int, counter: int = 7, *, whole: bool = False) -> list[bytearray]:
    """Pages before ``edge`` are of pass ``counter``, the others of the pass before."""
    return [
        page_content(index, counter if index < edge else counter - 1, PAGES, whole=whole)
        for index in range(PAGES)
    ]


def spliced(index: int, new: int, old: int, *, first_old_word: int, whole: bool) -> bytearray:
    """A page that was interrupted while the pass ``new`` wrote it."""
    page = page_content(index, new, PAGES, whole=whole)
    before = page_content(index, old, PAGES, whole=whole)
    page[first_old_word * 8 :] = before[first_old_word * 8 :]
    return page


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("edge", [1, 17, PAGES - 1])
def test_one_edge_is_consistent_in_any_order_of_pages(edge: int, whole: bool) -> None:
    pages = snapshot(edge, whole=whole)
    random.Random(edge).shuffle(pages)
    report = check_pages([*pages, bytes(4096)])
    assert report.consistent, report
    assert (report.pages, report.newer) == (PAGES, 7)
    assert (report.edge_page, report.edge_word) == (edge, 3)


def test_one_pass_everywhere_has_no_edge() -> None:
    report = check_pages(snapshot(PAGES))
    assert report.consistent
    assert report.edge_page is None


@pytest.mark.parametrize(("word", "whole"), [(256, False), (511, False), (6, True), (300, True)])
def test_the_edge_may_lie_inside_a_page(word: int, whole: bool) -> None:
    pages = snapshot(9, whole=whole)
    pages[9] = spliced(9, 7, 6, first_old_word=word, whole=whole)
    report = check_pages(pages)
    assert report.consistent, report
    assert (report.edge_page, report.edge_word) == (9, word)


def torn(case: str) -> list[bytearray]:
    pages = snapshot(20)
    match case:
        case "a newer page after the edge":
            pages[30] = page_content(30, 7, PAGES)
        case "an older page before the edge":
            pages[3] = page_content(3, 6, PAGES)
        case "a page of the next pass":
            pages[0] = page_content(0, 8, PAGES)
        case "a page two passes old":
            pages[39] = page_content(39, 5, PAGES)
        case "a second page with an edge inside":
            pages[25] = spliced(25, 7, 6, first_old_word=256, whole=False)
        case "newer words after older ones in a page":
            pages[20] = spliced(20, 6, 7, first_old_word=511, whole=False)
        case "a damaged check word":
            pages[12][2049] ^= 1
        case "a page is missing":
            del pages[11]
        case "the last page is missing":
            del pages[-1]
        case "a page is there twice":
            pages.append(pages[4])
        case "a page of another guest":
            struct.pack_into("<Q", pages[5], 32, PAGES + 1)
        case "an index beyond the end":
            pages.append(page_content(PAGES, 6, PAGES))
    return pages


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("a newer page after the edge", "page 30 word 3 is of pass 7, not of pass 6, after"),
        ("an older page before the edge", "page 4 word 3 is of pass 7"),
        ("a page of the next pass", "page 20 word 3 is of pass 6"),
        ("a page two passes old", "page 39 word 3 is of pass 5"),
        ("a second page with an edge inside", "page 25 word 3 is of pass 7"),
        ("newer words after older ones in a page", "page 20 word 511 is of pass 7"),
        ("a damaged check word", "page 12 word 256 is damaged"),
        ("a page is missing", "pages 11 to 11 are missing"),
        ("the last page is missing", "pages 39 to 39 are missing"),
        ("a page is there twice", "page 4 is there twice"),
        ("a page of another guest", "page 5 has another header"),
        ("an index beyond the end", "page 40 is there, but"),
    ],
)
def test_torn_snapshots_are_caught(case: str, problem: str) -> None:
    report = check_pages(torn(case))
    assert not report.consistent
    assert problem in str(report)


def test_a_torn_whole_page_is_caught_in_every_word() -> None:
    for word in (6, 7, 255, 256, 257, 511):
        pages = snapshot(20, whole=True)
        struct.pack_into("<Q", pages[2], word * 8, 0)
        assert f"page 2 word {word} is damaged" in str(check_pages(pages))


def test_nothing_is_no_proof() -> None:
    assert not check_pages([bytes(4096)]).consistent
    assert not check_pages([]).consistent


def test_a_short_page_is_a_problem() -> None:
    assert "has 100 bytes" in str(check_pages([*snapshot(3), snapshot(3)[0][:100]]))


def test_many_problems_are_counted_but_not_all_told() -> None:
    report = check_pages(page for page in snapshot(0) for _ in range(3))
    assert report.problem_count == 2 * PAGES
    assert len(report.problems) == 20


def test_guest_pages_finds_the_pages_in_an_image() -> None:
    pages = snapshot(20)
    image = b"\0" * 4096 + b"".join(page + b"\xff" * 4096 for page in pages) + b"rest"
    found = list(guest_pages(memoryview(image)))
    assert found == pages
