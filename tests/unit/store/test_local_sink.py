"""Local files: names, permissions, full disks, writers that die."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import HostError, NotFoundError, SinkError, UsageError
from stillframe.store.backends import local, write_behind
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.backends.write_behind import BUFFER_BYTES


def test_an_existing_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.still"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        LocalSink(path)
    assert path.read_bytes() == b"precious"


def test_overwriting_keeps_the_old_file_until_commit(tmp_path: Path) -> None:
    path = tmp_path / "x.still"
    path.write_bytes(b"old")
    sink = LocalSink(path, overwrite=True)
    sink.write(b"new")
    assert path.read_bytes() == b"old"
    sink.commit()
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.still"]


def test_an_aborted_overwrite_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.still"
    path.write_bytes(b"old")
    sink = LocalSink(path, overwrite=True)
    sink.write(b"new")
    sink.abort()
    assert path.read_bytes() == b"old"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.still"
    sink = LocalSink(path)
    sink.write(b"ours")
    path.write_bytes(b"theirs")
    with pytest.raises(SinkError, match="meanwhile"):
        sink.commit()
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["x.still"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link"])
def test_other_things_of_that_name_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.still"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a regular file"):
        LocalSink(path, overwrite=True)


@pytest.mark.parametrize("name", ["", ".", "/", "new/", ".."])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises((UsageError, SinkError)):
        LocalSink(f"{tmp_path}/{name}")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match=r"missing/x\.still") as caught:
        LocalSink(tmp_path / "missing" / "x.still")
    assert caught.value.remedy == "make the directory first"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SinkError, match="Not a directory"):
        LocalSink(tmp_path / "file" / "x.still")


def test_a_name_with_a_null_byte() -> None:
    with pytest.raises((SinkError, UsageError)):
        LocalSink("a\0b/x.still")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="too long"):
        LocalSink(tmp_path / ("x" * 300))


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(SinkError) as caught:
        LocalSink("/proc/self/x.still")
    assert caught.value.exit_code == 7


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The disk is 'full' (EFBIG) after this many bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_nothing(tmp_path: Path, file_size_limit: int) -> None:
    sink = LocalSink(tmp_path / "x.still")
    sink.write(bytes(file_size_limit + 1))
    with pytest.raises(SinkError, match="too large"):
        sink.commit()
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_does_not_fit(tmp_path: Path, file_size_limit: int) -> None:
    sink = LocalSink(tmp_path / "x.raw")
    with pytest.raises(SinkError):
        sink.set_length(file_size_limit + 1)
    with pytest.raises(SinkError):
        sink.set_length(1 << 70)
    sink.abort()


def test_a_failing_sync_gives_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = LocalSink(tmp_path / "x.still")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "scripted")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SinkError, match="Input/output error"):
        sink.commit()
    assert list(tmp_path.iterdir()) == []


_DIES = """
import os, signal, sys
from stillframe.store.backends import local
if sys.argv[2] == "hidden":
    def refuse(directory_fd):
        raise OSError(95, "no O_TMPFILE here")
    local._open_unnamed = refuse
sink = local.LocalSink(sys.argv[1])
sink.write(b"half a snapshot")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["unnamed", "hidden"])
def test_a_killed_writer_leaves_no_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.still"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run(
        [sys.executable, "-c", _DIES, str(path), kind], env=environment, timeout=120, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == (1 if kind == "hidden" else 0)
    LocalSink(path).abort()  # the next writer sweeps
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_spares_living_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory_fd: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")

    monkeypatch.setattr(local, "_open_unnamed", refuse)
    first = LocalSink(tmp_path / "first")
    second = LocalSink(tmp_path / "second")
    for sink in (first, second):
        sink.write(b"whole")
        sink.commit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("holds_the_lock", [False, True])
def test_a_sweep_before_the_lock_costs_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds_the_lock: bool
) -> None:
    """The file is made, and another writer's sweep finds it before it is locked."""

    def refuse(directory_fd: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")

    real, swept = fcntl.flock, []

    def sweep_first(fd: int, operation: int) -> None:
        if not swept:
            (path,) = tmp_path.iterdir()
            swept.append(path)
            with path.open() as file:
                real(file, operation)
                path.unlink()
                if holds_the_lock:
                    real(fd, operation)
        real(fd, operation)

    monkeypatch.setattr(local, "_open_unnamed", refuse)
    monkeypatch.setattr(fcntl, "flock", sweep_first)
    sink = LocalSink(tmp_path / "x.still")
    sink.write(b"whole")
    sink.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["x.still"]
    assert swept


def test_a_write_tells_that_an_earlier_one_failed(tmp_path: Path, file_size_limit: int) -> None:
    sink = LocalSink(tmp_path / "x.still")
    with pytest.raises(SinkError, match="too large"):
        sink.write(bytes(20 * BUFFER_BYTES))
    with pytest.raises(SinkError, match="too large"):
        sink.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["past the page cache", "through it", "refused when it comes to writing"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way whole buffers go."""
    if request.param == "through it":
        monkeypatch.setattr(write_behind, "_set_direct", lambda fd, wanted: False)
    elif request.param == "refused when it comes to writing":
        real = os.pwrite

        def refuse(fd: int, data: memoryview, offset_bytes: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "scripted")
            return real(fd, data, offset_bytes)

        monkeypatch.setattr(os, "pwrite", refuse)
    return str(request.param)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache: mincore(2)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * (-(-len(mapped) // mmap.PAGESIZE)))()
        first = ctypes.c_char.from_buffer(mapped)
        address, length = ctypes.addressof(first), ctypes.c_size_t(len(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), length, pages) == 0
        del first
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_whole_buffers_pass_the_page_cache_by(tmp_path: Path, way: str) -> None:
    path = tmp_path / "x.still"
    pieces = [os.urandom(BUFFER_BYTES // 3 + number) for number in range(20)]
    sink = LocalSink(path)
    for piece in pieces:
        sink.write(piece)
    sink.commit()
    cached = cached_bytes(path)
    assert path.read_bytes() == b"".join(pieces)
    if way == "past the page cache":
        assert cached <= BUFFER_BYTES
    else:
        assert cached > BUFFER_BYTES


def test_what_is_written_goes_to_the_disk_early(tmp_path: Path, way: str) -> None:
    with (tmp_path / "x.still").open("wb") as file:
        behind = write_behind.WriteBehind(file.fileno())
        behind.write(bytes(3 * BUFFER_BYTES + 5))
        deadline = time.monotonic() + 30
        while behind._taken_bytes - behind._on_disk_bytes > 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert behind._taken_bytes - behind._on_disk_bytes == 5
        behind.end()


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        LocalSource(tmp_path / "missing")
    with pytest.raises(NotFoundError):
        LocalSource(tmp_path / "missing" / "x")
    with pytest.raises(UsageError, match="regular"):
        LocalSource(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="regular"):
        LocalSource(tmp_path / "pipe")
    with pytest.raises(HostError):
        LocalSource("a\0b")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="Permission denied"):
        LocalSource(tmp_path / "x.still")


def test_file_and_directory_are_synced_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.still"
    seen: list[tuple[str, bool]] = []
    real = os.fsync

    def watch(fd: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        seen.append((kind, path.exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", watch)
    sink = LocalSink(path)
    sink.write(b"whole")
    sink.commit()
    assert seen == [("file", False), ("directory", True)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_directory_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems do not offer it; a real failure is told."""
    sink = LocalSink(tmp_path / "x.still")
    sink.write(b"whole")
    real = os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, "scripted")
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EINVAL:
        sink.commit()
    else:
        with pytest.raises(SinkError, match="Input/output error"):
            sink.commit()
    assert (tmp_path / "x.still").exists() == (number == errno.EINVAL)
