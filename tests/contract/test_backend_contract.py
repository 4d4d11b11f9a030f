"""What every backend of the store must do; each backend subclasses the suites."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import DataError, SinkError, UsageError
from stillframe.still.sinks import Sink, Source, SparseSink
from stillframe.store.backends import local as local_module
from stillframe.store.backends.local import LocalSink
from stillframe.store.backends.local_source import LocalSource
from stillframe.store.backends.pipe import PipeSink
from stillframe.store.backends.write_behind import BUFFER_BYTES
from tests.support_store.memory import MemorySink, MemorySource


class SinkContract:
    """Subclasses give a fresh ``sink``, and what came out of it."""

    has_name = True

    @pytest.fixture
    def sink(self) -> Iterator[Sink]:
        raise NotImplementedError

    def content(self, sink: Sink) -> bytes | None:
        """What was committed; None if nothing is there."""
        raise NotImplementedError

    def test_is_a_sink(self, sink: Sink) -> None:
        assert isinstance(sink, Sink)
        assert sink.description

    def test_committed_bytes_come_out_in_order(self, sink: Sink) -> None:
        sink.write(b"one")
        sink.write(bytearray(b" two"))
        sink.write(memoryview(b"x three x")[1:7])
        sink.commit()
        assert self.content(sink) == b"one two three"

    def test_a_write_larger_than_any_buffer(self, sink: Sink) -> None:
        data = os.urandom(1 << 20) * 3 + b"end"
        sink.write(data)
        sink.commit()
        assert self.content(sink) == data

    def test_nothing_written_is_an_empty_thing(self, sink: Sink) -> None:
        sink.write(b"")
        sink.commit()
        assert self.content(sink) == b""

    def test_abort_leaves_nothing(self, sink: Sink) -> None:
        sink.write(b"half a snapshot")
        sink.abort()
        sink.abort()
        if self.has_name:
            assert self.content(sink) is None

    def test_abort_after_commit_does_nothing(self, sink: Sink) -> None:
        sink.write(b"whole")
        sink.commit()
        sink.abort()
        assert self.content(sink) == b"whole"

    @pytest.mark.parametrize("end", ["commit", "abort"])
    @pytest.mark.parametrize("after", ["write", "commit"])
    def test_nothing_works_after_the_end(self, sink: Sink, end: str, after: str) -> None:
        getattr(sink, end)()
        with pytest.raises(UsageError, match="already"):
            sink.write(b"more") if after == "write" else sink.commit()


class TestMemorySink(SinkContract):
    @pytest.fixture
    def sink(self) -> MemorySink:
        return MemorySink()

    def content(self, sink: Sink) -> bytes | None:
        assert isinstance(sink, MemorySink)
        try:
            return sink.content
        except UsageError:
            return None


class TestLocalSink(SinkContract):
    overwrite = False

    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        sink = LocalSink(tmp_path / "out", overwrite=self.overwrite)
        yield sink
        sink.abort()
        assert {path.name for path in tmp_path.iterdir()} <= {"out"}

    def content(self, sink: Sink) -> bytes | None:
        path = Path(sink.description)
        return path.read_bytes() if path.exists() else None

    def test_has_no_name_before_commit(self, sink: Sink) -> None:
        sink.write(b"half")
        assert self.content(sink) is None

    @pytest.mark.parametrize("umask", [0, 0o777])
    def test_is_private_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        path = tmp_path / "private"
        before = os.umask(umask)
        try:
            LocalSink(path).commit()
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o600

    def test_more_than_its_buffers_hold(self, sink: Sink) -> None:
        pieces = [os.urandom(BUFFER_BYTES * 2 // 3 + number) for number in range(13)]
        for piece in pieces:
            sink.write(piece)
        sink.commit()
        assert self.content(sink) == b"".join(pieces)

    def test_takes_bytes_at_any_place(self, sink: Sink) -> None:
        assert isinstance(sink, SparseSink)
        sink.set_length(1 << 30)
        sink.write_at(1 << 29, b"middle")
        sink.write_at(0, b"start")
        sink.commit()
        path = Path(sink.description)
        assert path.stat().st_size == 1 << 30
        assert path.stat().st_blocks * 512 < 1 << 20
        with path.open("rb") as file:
            assert file.read(6) == b"start\0"
            file.seek(1 << 29)
            assert file.read(7) == b"middle\0"


class TestLocalSinkOverwriting(TestLocalSink):
    overwrite = True


class TestLocalSinkWithoutUnnamedFiles(TestLocalSink):
    """As on a file system without O_TMPFILE."""

    @pytest.fixture(autouse=True)
    def no_unnamed_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(directory_fd: int) -> int:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")

        monkeypatch.setattr(local_module, "_open_unnamed", refuse)

    def test_is_hidden_before_commit(self, sink: Sink) -> None:
        names = [path.name for path in Path(sink.description).parent.iterdir()]
        assert len(names) == 1
        assert names[0].startswith(".")


class TestLocalSinkOverwritingWithoutUnnamedFiles(TestLocalSinkWithoutUnnamedFiles):
    overwrite = True


class TestPipeSink(SinkContract):
    has_name = False
    blocking = True

    @pytest.fixture
    def sink(self) -> Iterator[Sink]:
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, self.blocking)
        self.received = bytearray()

        def drain() -> None:
            while part := os.read(reading, 65536):
                self.received += part

        self.reader = threading.Thread(target=drain)
        self.reader.start()
        yield PipeSink(self.writing, description="a pipe")
        self._close()
        os.close(reading)

    def _close(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1
        self.reader.join(60)

    def content(self, sink: Sink) -> bytes | None:
        self._close()
        return bytes(self.received)


class TestPipeSinkThatDoesNotBlock(TestPipeSink):
    blocking = False


class TestPipeSinkIntoAFile(SinkContract):
    """Standard output redirected to a file."""

    has_name = False

    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        self.path = tmp_path / "redirected"
        with self.path.open("wb") as file:
            yield PipeSink(file.fileno())

    def content(self, sink: Sink) -> bytes | None:
        return self.path.read_bytes()


class SourceContract:
    content = bytes(range(256)) * 20

    @pytest.fixture
    def source(self) -> Iterator[Source]:
        raise NotImplementedError

    def test_is_a_source(self, source: Source) -> None:
        assert isinstance(source, Source)
        assert source.description
        assert source.size_bytes == len(self.content)

    @pytest.mark.parametrize(("offset", "length"), [(0, 5), (100, 4000), (5119, 1), (5120, 0)])
    def test_reads_exactly(self, source: Source, offset: int, length: int) -> None:
        assert source.read_at(offset, length) == self.content[offset : offset + length]

    @pytest.mark.parametrize(("offset", "length"), [(0, 5121), (5120, 1), (1 << 70, 1), (-1, 1)])
    def test_refuses_what_is_not_there(self, source: Source, offset: int, length: int) -> None:
        with pytest.raises(DataError):
            source.read_at(offset, length)

    def test_may_be_closed_twice(self, source: Source) -> None:
        source.close()
        source.close()


class TestMemorySource(SourceContract):
    @pytest.fixture
    def source(self) -> MemorySource:
        return MemorySource(self.content)


class TestLocalSource(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Source]:
        path = tmp_path / "in"
        path.write_bytes(self.content)
        source = LocalSource(path)
        yield source
        source.close()

    def test_knows_its_owner(self, source: Source) -> None:
        assert source.owner_uid == os.getuid()
        assert not source.others_may_write

    def test_a_file_that_shrinks_is_an_error(self, source: Source) -> None:
        os.truncate(source.description, 100)
        with pytest.raises(DataError, match="truncated"):
            source.read_at(0, 101)


def test_a_closed_pipe_is_a_sink_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = PipeSink(writing, description="a pipe")
    with pytest.raises(SinkError, match="Broken pipe"):
        sink.write(b"x")
    os.close(writing)


def test_a_full_disk_is_a_sink_error() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        sink = PipeSink(full.fileno())
        with pytest.raises(SinkError, match="No space left") as caught:
            sink.write(b"x")
    assert caught.value.remedy


def test_a_terminal_is_refused() -> None:
    controlling, terminal = os.openpty()
    try:
        with pytest.raises(UsageError, match="terminal"):
            PipeSink(terminal)
    finally:
        os.close(controlling)
        os.close(terminal)


def test_a_descriptor_that_is_not_open_is_a_sink_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(SinkError):
        PipeSink(writing)
