"""The mark of this host: who has it, and what makes it void."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from stillframe.errors import HostError
from stillframe.model import Manifest
from stillframe.still.container import decode_manifest
from stillframe.still.host_mark import NO_MARK, HostKey, state_directory
from stillframe.still.writer import SnapshotWriter, encode_manifest
from stillframe.store import open_snapshot
from stillframe.store.backends.local import LocalSink
from tests.support_store import small

INDEX = bytes(range(32))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/stillframe/host.key"


def manifest(*notes: str) -> Manifest:
    return msgspec.structs.replace(small.manifest(), mark=NO_MARK, notes=notes)


def written(path: Path, seed: int, *, mark: str = "", key: HostKey | None = None) -> Path:
    """A snapshot with RAM by a seed; with a key's mark, or somebody's text in its place."""
    with SnapshotWriter(LocalSink(path, overwrite=True)) as writer:
        writer.append_stream(small.head())
        small.write_ram(writer, small.random_ram(seed))
        writer.append_stream(small.tail())
        if mark:
            key = type("Forger", (), {"marked": lambda _, __, m: m.replace(
                NO_MARK.encode(), mark.encode(), 1)})()  # fmt: skip
        writer.finish(small.manifest(), key=key)
    return path


def test_a_mark_holds_for_what_was_marked_only(tmp_path: Path) -> None:
    key = HostKey.load_or_make()
    with open_snapshot(written(tmp_path / "a", 1, key=key)) as opened:
        assert opened.was_taken_here
        mark = opened.manifest.mark
    with open_snapshot(written(tmp_path / "b", 2, mark=mark)) as opened:
        assert opened.manifest.mark == mark, "the mark was carried over"
        assert not opened.was_taken_here, "other RAM, so another index"
    with open_snapshot(written(tmp_path / "c", 1)) as opened:
        assert not opened.was_taken_here


def test_a_changed_manifest_is_not_marked() -> None:
    key = HostKey.load_or_make()
    content = key.marked(INDEX, encode_manifest(manifest("a")))
    mark = decode_manifest(content).mark
    assert key.made(mark, INDEX, content)
    assert not key.made(mark, INDEX, content.replace(b'"a"', b'"b"'))
    assert not key.made(mark, INDEX[::-1], content)
    assert not key.made("f" * 64, INDEX, content.replace(mark.encode(), b"f" * 64))
    assert not key.made("é" * 64, INDEX, content)


def test_text_that_looks_like_an_empty_mark_is_no_mark() -> None:
    key = HostKey.load_or_make()
    note = f'"mark": "{NO_MARK}"'
    content = key.marked(INDEX, encode_manifest(manifest(note)))
    decoded = decode_manifest(content)
    assert decoded.notes == (note,)
    assert decoded.mark != NO_MARK
    assert key.made(decoded.mark, INDEX, content)


def test_the_key_is_the_users_alone(state: Path) -> None:
    assert HostKey.load() is None
    HostKey.load_or_make()
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert os.listdir(state.parent) == ["host.key"]
    state.chmod(0o640)
    assert HostKey.load() is None
    with pytest.raises(HostError, match="open to others"):
        HostKey.load_or_make()
    state.chmod(0o600)
    state.write_bytes(b"short")
    assert HostKey.load() is None
    state.unlink()
    state.symlink_to("/dev/zero")
    assert HostKey.load() is None


def test_another_key_and_another_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = HostKey(b"a" * 32).marked(INDEX, encode_manifest(manifest()))
    mark = decode_manifest(content).mark
    assert not HostKey(b"b" * 32).made(mark, INDEX, content)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"another machine's id")
    assert not HostKey(b"a" * 32).made(mark, INDEX, content)


def test_many_who_make_it_have_one(state: Path) -> None:
    marks: list[bytes] = []

    def make() -> None:
        marks.append(HostKey.load_or_make().marked(INDEX, encode_manifest(manifest())))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(marks)) == 1
    assert os.listdir(state.parent) == ["host.key"]


def test_without_a_place_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert HostKey.load() is None
    with pytest.raises(HostError, match="cannot make the key"):
        HostKey.load_or_make()
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_directory().is_absolute()
