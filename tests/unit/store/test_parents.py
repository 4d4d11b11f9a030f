"""Where an increment's parents are looked for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.errors import NotFoundError
from stillframe.store import open_file, open_snapshot
from tests.support_store.chains import MadeChain, ram_of
from tests.support_store.small import random_ram, small_file

_IN_OPEN = 0x20


@pytest.fixture
def chain() -> MadeChain:
    chain = MadeChain()
    chain.add(random_ram(1))
    chain.add({(0, 1): None})
    return chain


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_beside_the_increment_whatever_it_is_called(chain: MadeChain, tmp_path: Path) -> None:
    put(tmp_path / "another.still", small_file())
    put(tmp_path / "broken.still", b"no snapshot")
    put(tmp_path / "z.still", chain.contents[0])
    with open_snapshot(put(tmp_path / "top.still", chain.contents[1])) as snapshot:
        assert ram_of(snapshot) == random_ram(1) | {(0, 1): None}


@pytest.mark.parametrize("as_file", [True, False])
def test_in_the_place_given(chain: MadeChain, tmp_path: Path, as_file: bool) -> None:
    parent = put(tmp_path / "parents" / "base.still", chain.contents[0])
    top = put(tmp_path / "top.still", chain.contents[1])
    with pytest.raises(NotFoundError):
        open_snapshot(top)
    with open_snapshot(top, parents=[parent if as_file else parent.parent]) as snapshot:
        assert len(snapshot.files) == 2


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of this host."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@contextmanager
def opened_never(path: Path) -> Iterator[None]:
    """By inotify(7), which tells of no O_PATH: that opens nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) >= 0
        yield
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
    finally:
        os.close(fd)


def increment(base: Path, *, here: bool) -> tuple[bytes, bytes]:
    """A base and what builds on it, which says that it was there."""
    chain = MadeChain(parent_path=str(base))
    chain.add(random_ram(1))
    chain.add({}, here=here)
    return chain.contents[0], chain.contents[1]


@pytest.mark.usefixtures("state")
def test_where_it_was(tmp_path: Path) -> None:
    base = tmp_path / "then" / "base.still"
    below, top = increment(base, here=True)
    put(base, below)
    with open_snapshot(put(tmp_path / "now" / "top.still", top)) as snapshot:
        assert snapshot.files[1].source.description == str(base)


@pytest.mark.usefixtures("state")
def test_a_file_from_elsewhere_makes_us_look_nowhere(tmp_path: Path) -> None:
    base = tmp_path / "then" / "base.still"
    below, top = increment(base, here=False)
    put(base, below)
    file = put(tmp_path / "now" / "top.still", top)
    with opened_never(base), pytest.raises(NotFoundError, match=f"not at {base}: .*not taken here"):
        open_snapshot(file)
    open_snapshot(file, parents=[base]).close()


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("here", [True, False])
def test_what_is_no_file_is_not_opened(tmp_path: Path, here: bool) -> None:
    """As a watchdog's device, which then begins to count."""
    pipe = tmp_path / "base.still"
    os.mkfifo(pipe)
    _, top = increment(pipe, here=here)
    (tmp_path / "link.still").symlink_to(pipe)
    file = put(tmp_path / "top.still", top)
    with opened_never(pipe), pytest.raises(NotFoundError):
        open_snapshot(file, parents=[pipe])


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "/proc/self/mem", "x" * 5000, "/"])
def test_a_hostile_path_does_no_harm(tmp_path: Path, path: str) -> None:
    chain = MadeChain(parent_path=path)
    chain.add(random_ram(1))
    chain.add({})
    with pytest.raises(NotFoundError):
        open_snapshot(put(tmp_path / "top.still", chain.contents[1]))


def test_what_is_missing_is_said_in_one_line(chain: MadeChain, tmp_path: Path) -> None:
    top = put(tmp_path / "top.still", chain.contents[1])
    with pytest.raises(NotFoundError) as caught:
        open_snapshot(top, parents=["/nowhere"])
    text = str(caught.value)
    assert "\n" not in text
    for part in (chain.ids[0], str(top), "/nowhere", "/gone/parent.still", str(tmp_path)):
        assert part in text


def test_one_file_for_itself_needs_no_parent(chain: MadeChain, tmp_path: Path) -> None:
    with open_file(put(tmp_path / "top.still", chain.contents[1])) as file:
        assert file.manifest.parent is not None
        assert file.manifest.parent.id == chain.ids[0]
        assert sum(file.index.page_counts(0)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize(("mode", "shown"), [(0o600, False), (0o644, True)])
def test_another_users_increment_does_not_get_at_our_snapshot(
    chain: MadeChain, tmp_path: Path, mode: int, shown: bool
) -> None:
    put(tmp_path / "base.still", chain.contents[0]).chmod(mode)
    top = put(tmp_path / "top.still", chain.contents[1])
    os.chown(top, 65534, 65534)
    if shown:
        open_snapshot(top).close()
    else:
        with pytest.raises(NotFoundError, match=r"base.still belongs to somebody else"):
            open_snapshot(top)
