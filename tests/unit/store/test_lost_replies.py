"""A catalog that does not answer: what may be in it keeps its data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillframe.errors import SinkError
from stillframe.store.records import CATALOG, PENDING, Entry
from stillframe.store.repair import repair_store
from tests.support_store.memory_objects import MemoryObjects
from tests.support_store.mortal import Host
from tests.support_store.stores import put, store_on


class SilentCatalog(MemoryObjects):
    """While ``silent``, nothing is told of the catalog. ``arrives``: what is sent gets there."""

    def __init__(self, *, arrives: bool) -> None:
        super().__init__()
        self.silent, self._known = False, set[str]()
        self._arrives = arrives

    def create(self, key: str, data: bytes) -> bool:
        if self.silent and key.startswith(CATALOG):
            if self._arrives:
                super().create(key, data)
            raise SinkError("no reply")
        return super().create(key, data)

    def read(self, key: str) -> bytes:
        if self.silent and key.startswith(CATALOG) and key not in self._known:
            raise SinkError("no reply")
        return super().read(key)

    def fall_silent(self) -> None:
        self.silent, self._known = True, set(self.objects)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    with host.installed():
        yield host


@pytest.mark.parametrize("arrives", [True, False])
def test_what_may_be_in_the_catalog_keeps_its_data(host: Host, arrives: bool) -> None:
    objects = SilentCatalog(arrives=arrives)
    taker, mender = host.start(), host.start()
    with host.running(taker):
        store = store_on(objects)
        parent: Entry = put(store)
        objects.fall_silent()
        with pytest.raises(SinkError, match="no reply"):
            put(store, parent=parent)
    objects.silent = False
    assert len(objects.listing(PENDING)) == 1
    host.kill(taker)
    with host.running(mender):
        assert repair_store(store).lost == {}
        assert objects.listing(PENDING) == []
        (child,) = (entry for entry in store.catalog().entries.values() if entry.parent)
        assert child.parent == parent.id
        with store.open(child) as snapshot:
            snapshot.verify()
