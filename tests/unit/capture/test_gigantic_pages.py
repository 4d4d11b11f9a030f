"""Huge pages of 1 GiB: refused in the background, copied in small pieces in a stop."""

from __future__ import annotations

import os

import pytest

from stillframe.capture.ram_capture import RamCapture
from stillframe.errors import RefusedError
from stillframe.kernel.userfaultfd import Userfaultfd
from stillframe.model import RamBlock
from tests.support.probes import has_uffd_wp

GIGANTIC = RamBlock(
    idstr="pc.ram",
    hva=1 << 40,
    used_length_bytes=1 << 30,
    max_length_bytes=1 << 30,
    page_size_bytes=1 << 30,
    backing="anonymous",
)


def test_refused_in_the_background() -> None:
    has_uffd_wp().require()
    with (
        Userfaultfd.for_this_process() as uffd,
        pytest.raises(RefusedError, match=r"1024 MiB.*--mode stop"),
    ):
        RamCapture(uffd, os.getpid(), [GIGANTIC], spill_bytes=1 << 20)


def test_a_stopped_guest_needs_no_gigantic_buffers() -> None:
    ram = RamCapture(None, os.getpid(), [GIGANTIC], spill_bytes=1 << 20)
    try:
        assert ram.spill_bytes == 2 << 20
    finally:
        ram.close()
