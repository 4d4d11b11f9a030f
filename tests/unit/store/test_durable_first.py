"""What reaches the disk when: the entry gets its name after all that it names is synced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillframe.store.records import catalog_key, data_key
from tests.support_store.stores import folder_store, put


def test_the_entry_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = folder_store(tmp_path / "store")
    real_fsync, real_link = os.fsync, os.link
    done: list[tuple[str, str]] = []

    def fsync(fd: int) -> None:
        real_fsync(fd)
        done.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))

    def link(source: str, name: str, *, dst_dir_fd: int, follow_symlinks: bool) -> None:
        done.append(("sync before", os.readlink(source)))
        real_link(source, name, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
        done.append(("name", f"{os.readlink(f'/proc/self/fd/{dst_dir_fd}')}/{name}"))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    entry = put(store)
    place = tmp_path / "store"
    names = [path for what, path in done if what == "name"]
    data = str(place / data_key(entry.name))
    catalog = str(place / catalog_key(entry.id))
    assert names[1:] == [data, catalog]
    assert Path(names[0]).parent == place / "pending"
    for name in names:
        at = done.index(("name", name))
        assert done[at - 2][0] == "sync"  # the content, while it has no name
        assert done[at - 2][1] == done[at - 1][1]
        assert done[at + 1] == ("sync", str(Path(name).parent))
    before = done[: done.index(("name", catalog))]
    assert ("sync", str(place / "snapshots")) in before
    assert ("sync", str(place)) in before  # in which the folders were made
