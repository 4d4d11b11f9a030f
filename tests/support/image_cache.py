"""Complete images in tests: a guest, a cache of the test's own, and what is in it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.image.cached import ImageCache
from stillframe.restore.restored import RestoredVm
from stillframe.store import open_snapshot
from tests.integration.cli import program
from tests.support.probes import has_linux_guest, has_uffd_wp

RAM_MIB, PAGES = 160, 8192
PAGE = 4096


@pytest.fixture(name="source", scope="module")
def image_source() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=RAM_MIB, populate_mib=48, name="origin").start() as vm:
        yield vm


@pytest.fixture(name="cache", autouse=True)
def image_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageCache:
    monkeypatch.setenv("STILLFRAME_IMAGES", str(tmp_path / "images"))
    return ImageCache()


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The program, to its end."""
    done = program.run(*words)
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def taken(source: GuestVm, file: Path, **options: object) -> str:
    """With its image; the snapshot's id."""
    return api.take(source.pid, file, image=True, **options).wait(120).id  # type: ignore[arg-type]


def wrong_pages(cache: ImageCache, file: Path) -> list[int]:
    """Pages of the image that are not the snapshot's, all of RAM compared."""
    with open_snapshot(file) as snapshot:
        image = cache.open(snapshot.id)
        assert image is not None
        with image:
            wrong = []
            for block in image.record.blocks:
                content = os.pread(image.fds[block.number], block.length_bytes, 0)
                assert len(content) == block.length_bytes
                wrong += [
                    page
                    for page, wanted in snapshot.iter_pages(block.idstr)
                    if content[page * PAGE : (page + 1) * PAGE] != (wanted or bytes(PAGE))
                ]
            assert image.record.blocks
            return wrong


def assert_on_image(vm: RestoredVm) -> None:
    assert vm.image_path is None
    assert any("complete image" in note for note in vm.notes), vm.notes
