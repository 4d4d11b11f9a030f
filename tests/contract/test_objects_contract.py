"""What every place for a store must do; each backend subclasses the suite."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import NotFoundError, SinkError, UsageError
from stillframe.still.sinks import Sink, Source
from stillframe.store.backends.folder import LocalFolder
from stillframe.store.backends.objects import Backend
from tests.contract.test_backend_contract import SinkContract, SourceContract
from tests.support_store.memory_objects import MemoryObjects


class ObjectsContract:
    """Subclasses give an empty ``objects``, and ``again``: the same place, opened anew."""

    @pytest.fixture
    def objects(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def again(self, objects: Backend) -> Backend:
        raise NotImplementedError

    def test_is_a_backend(self, objects: Backend) -> None:
        assert isinstance(objects, Backend)
        assert objects.description

    def test_an_object_is_made_once(self, objects: Backend, again: Backend) -> None:
        assert objects.create("catalog/a.json", b"one")
        assert not again.create("catalog/a.json", b"one")
        assert not again.create("catalog/a.json", b"two")
        assert again.read("catalog/a.json") == b"one"

    def test_an_object_may_be_empty(self, objects: Backend, again: Backend) -> None:
        assert objects.create("tags/a", b"")
        assert not again.create("tags/a", b"")
        assert again.read("tags/a") == b""

    def test_one_of_many_makes_it(self, objects: Backend, again: Backend) -> None:
        start, made = threading.Barrier(8), []

        def make(number: int) -> None:
            start.wait()
            if (objects, again)[number % 2].create("catalog/a", b"%d" % number):
                made.append(number)

        threads = [threading.Thread(target=make, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert objects.read("catalog/a") == b"%d" % made[0]

    def test_what_is_not_there(self, objects: Backend) -> None:
        with pytest.raises(NotFoundError):
            objects.read("catalog/none")
        with pytest.raises(NotFoundError):
            objects.open("catalog/none")
        assert objects.listing("catalog/") == []
        objects.delete("catalog/none")

    def test_lists_by_prefix(self, objects: Backend, again: Backend) -> None:
        for key in ("b/2", "b/1", "a/x.disks/1", "a/x", "bb/1"):
            objects.create(key, key.encode() * 2)
        assert [(one.key, one.bytes) for one in again.listing("b/")] == [("b/1", 6), ("b/2", 6)]
        assert [one.key for one in again.listing("a/x")] == ["a/x", "a/x.disks/1"]
        assert [one.key for one in again.listing("a/x.")] == ["a/x.disks/1"]
        assert len(again.listing("")) == 5
        assert all(one.modified_s > 1e9 for one in again.listing(""))

    def test_what_was_deleted_is_gone_and_can_be_made_again(
        self, objects: Backend, again: Backend
    ) -> None:
        objects.create("a/x.disks/1", b"one")
        objects.delete("a/x.disks/1")
        assert again.listing("") == []
        assert again.create("a/x.disks/1", b"two")
        assert objects.read("a/x.disks/1") == b"two"

    def test_a_large_object_has_its_name_at_the_end(self, objects: Backend, again: Backend) -> None:
        sink = objects.sink("snapshots/a")
        sink.write(b"half")
        assert again.listing("") == []
        sink.write(b"whole")
        sink.commit()
        assert again.open("snapshots/a").read_at(2, 5) == b"lfwho"

    def test_a_large_object_that_is_given_up_leaves_nothing(self, objects: Backend) -> None:
        sink = objects.sink("snapshots/a")
        sink.write(b"half")
        sink.abort()
        assert objects.listing("") == []

    def test_a_large_object_replaces_nothing(self, objects: Backend, again: Backend) -> None:
        late = objects.sink("snapshots/a")
        late.write(b"late")
        again.create("snapshots/a", b"first")
        with pytest.raises((SinkError, UsageError)):
            late.commit()
        assert again.read("snapshots/a") == b"first"


class SinkOfObjects(SinkContract):
    """The sinks of a backend are sinks."""

    objects: Backend

    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        self.objects = self.place(tmp_path)
        sink = self.objects.sink("snapshots/a")
        yield sink
        sink.abort()

    def place(self, tmp_path: Path) -> Backend:
        raise NotImplementedError

    def content(self, sink: Sink) -> bytes | None:
        try:
            return self.objects.read("snapshots/a")
        except NotFoundError:
            return None


class TestMemoryObjects(ObjectsContract):
    @pytest.fixture
    def objects(self) -> MemoryObjects:
        return MemoryObjects()

    @pytest.fixture
    def again(self, objects: MemoryObjects) -> MemoryObjects:
        return objects


class TestLocalFolder(ObjectsContract):
    @pytest.fixture
    def objects(self, tmp_path: Path) -> LocalFolder:
        return LocalFolder(tmp_path / "not" / "made")

    @pytest.fixture
    def again(self, tmp_path: Path) -> LocalFolder:
        return LocalFolder(tmp_path / "not" / "made")

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a//b", "a/../b", ".hidden"])
    def test_a_key_stays_inside(self, objects: LocalFolder, key: str) -> None:
        with pytest.raises(UsageError):
            objects.create(key, b"")

    def test_files_of_writers_are_no_objects(self, objects: LocalFolder) -> None:
        objects.create("snapshots/a", b"")
        objects.path("snapshots/a").with_name(".1234.still-part").touch()
        assert [one.key for one in objects.listing("")] == ["snapshots/a"]


class TestSinkOfLocalFolder(SinkOfObjects):
    def place(self, tmp_path: Path) -> LocalFolder:
        return LocalFolder(tmp_path)


class TestSinkOfMemoryObjects(SinkOfObjects):
    def place(self, tmp_path: Path) -> MemoryObjects:
        return MemoryObjects()


class TestSourceOfLocalFolder(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Source]:
        objects = LocalFolder(tmp_path)
        objects.create("snapshots/a", self.content)
        source = objects.open("snapshots/a")
        yield source
        source.close()
