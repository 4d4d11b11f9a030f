"""Huge pages for the tests that need some, wherever the tests are run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

_PAGES = Path("/proc/sys/vm/nr_hugepages")
_WANTED = 544
"""2 MiB pages: two VMs of 512 MiB, and some."""


@pytest.fixture(scope="session", autouse=True)
def huge_pages() -> Iterator[None]:
    """Have the kernel set them aside for as long as the tests run, if we may ask it."""
    try:
        before = int(_PAGES.read_text())
        _PAGES.write_text(str(max(before, _WANTED)))
    except OSError:
        yield  # the probes say what is missing
        return
    yield
    with contextlib.suppress(OSError):
        _PAGES.write_text(str(before))
