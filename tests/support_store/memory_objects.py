"""A store's objects in memory: quick, and shared by all who hold it."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Lock

from stillframe.errors import NotFoundError, SinkError
from stillframe.store.backends.objects import StoredObject
from tests.support_store.memory import MemorySink, MemorySource


class MemoryObjects:
    """``age_s``: how old the objects look."""

    description = "memory"
    age_s = 0.0

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = Lock()

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if key in self.objects:
                return False
            self.objects[key] = data
            return True

    def read(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise NotFoundError(f"there is no {key}") from None

    def open(self, key: str) -> MemorySource:
        return MemorySource(self.read(key))

    def listing(self, prefix: str) -> list[StoredObject]:
        return [
            StoredObject(key, len(data), time.time() - self.age_s)
            for key, data in sorted(self.objects.items())
            if key.startswith(prefix)
        ]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def sink(self, key: str) -> MemorySink:
        return _ObjectSink(self, key)

    def path(self, key: str) -> Path | None:
        return None


class _ObjectSink(MemorySink):
    def __init__(self, objects: MemoryObjects, key: str) -> None:
        super().__init__()
        self._objects = objects
        self._key = key

    def commit(self) -> None:
        super().commit()
        if not self._objects.create(self._key, self.content):
            raise SinkError(f"{self._key} is there already")
