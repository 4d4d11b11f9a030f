"""The writer writes in the known order, at its rate, and knows when it did not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.consistency import check_pages, guest_pages
from tests.unit.board.guests.running import TIMEOUT_S, RunningGuest

PAGE = 4096


@pytest.mark.parametrize("whole", [0, 1])
def test_images_show_the_known_order(own_guest: Callable[[str], Path], whole: int) -> None:
    with RunningGuest(own_guest("writer"), f"pages=300 whole={whole} tick_ms=10", vcpus=2) as guest:
        guest.wait("^writer ready pages=300 ")
        edges, images, newest = set(), [], []
        deadline_s = time.monotonic() + TIMEOUT_S
        # The last one two passes after the first: halves of those two cannot be of one instant.
        while len(edges) < 5 or newest[-1] < newest[0] + 2:
            assert time.monotonic() < deadline_s, "it does not write"
            # Old ticks may be on their way still; so it is looked at whether it went on.
            guest.wait("^tick ", since=guest.console.mark())
            image = guest.image()
            report = check_pages(guest_pages(image))
            assert report.consistent, report
            assert report.expected_pages == 300
            if (report.newer, report.edge_page) not in edges:
                edges.add((report.newer, report.edge_page))
                images.append(image)
                newest.append(report.newer)
        assert guest.ask("a", "^AUDIT").startswith("AUDIT ok pages=300 pass=")
        # half of another instant
        half = len(images[0]) // 2
        start = images[0].index(b"StillframeGuest\n")
        middle = start + 150 * PAGE
        assert middle < half
        torn = images[0][:middle] + images[-1][middle:]
        assert not check_pages(guest_pages(torn)).consistent
        guest.ask("q", "^writer off passes=")
        assert guest.exit_status() == 0


def test_rate(own_guest: Callable[[str], Path]) -> None:
    with RunningGuest(own_guest("writer"), "rate=2 tick_ms=250") as guest:
        guest.wait("^writer ready")
        first = _pages(guest.wait("^tick 1 passes=[0-9]+ pages=[0-9]+ gap_us=[0-9]+$"))
        second = _pages(guest.wait("^tick 5 "))
        # 2 MiB/s for a second of the guest's, in ticks that may come late on a loaded host
        assert 200 <= second - first <= 1100
        assert guest.ask("a", "^AUDIT").startswith("AUDIT ok")


def test_the_audit_finds_an_older_page(own_guest: Callable[[str], Path]) -> None:
    with RunningGuest(own_guest("writer"), "pages=300") as guest:
        guest.wait("^writer ready")
        image = guest.image()
        at = image.index(b"StillframeGuest\n")
        guest.wait("^tick 1")
        guest.board.stop()
        guest.write(at, image[at : at + PAGE])
        guest.board.cont()
        answer = guest.ask("a", "^AUDIT")
        # the next pass may have mended it by then; a page that is not written again stays wrong
        assert answer.startswith("AUDIT")
        guest.board.stop()
        guest.write(at + 5 * 8, (99).to_bytes(8, "little"))
        guest.board.cont()
        answer = guest.ask("a", "^AUDIT")
        assert answer.startswith("AUDIT FAILED pages=300 ")
        assert answer.endswith("bad=1 first_page=0 word=5 found=0x63")
        guest.console.send("q")
        assert guest.exit_status() == 1


def test_too_many_pages(own_guest: Callable[[str], Path]) -> None:
    with RunningGuest(own_guest("writer"), "pages=999999") as guest:
        guest.wait("^writer: pages=999999, but there is room for [0-9]+$")
        assert guest.exit_status() == 2


def _pages(tick: str) -> int:
    return int(tick.split(" pages=")[1].split()[0])
