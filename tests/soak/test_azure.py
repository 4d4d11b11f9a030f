"""Azure's blob storage is a place for a store as a folder is: the same suites, against Azurite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.restore.restored import list_restored
from stillframe.store.backends.bucket import Bucket
from tests.contract.test_objects_contract import ObjectsContract, SinkOfObjects
from tests.integration.test_fork import assert_goes_on
from tests.support_store.azure_server import AzureServer, azure_server

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with azure_server(tmp_path_factory.mktemp("azurite")) as server:
        yield server


class TestAzure(ObjectsContract):
    @pytest.fixture
    def objects(self, server: AzureServer) -> Bucket:
        return Bucket(server.url)

    @pytest.fixture
    def again(self, objects: Bucket) -> Bucket:
        return Bucket(objects.description)


class TestSinkOfAzure(SinkOfObjects):
    @pytest.fixture(autouse=True)
    def _bucket(self, server: AzureServer) -> None:
        self.url = server.url

    def place(self, tmp_path: Path) -> Bucket:
        return Bucket(self.url)


def test_taken_into_it_and_started_from_it(
    server: AzureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLFRAME_STORE", server.url)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    store = api.init()
    with GuestVm("linux", ram_mib=192, populate_mib=32, tick_ms=50, name="web1").start() as guest:
        first = api.take(str(guest.qmp_path)).wait(120)
        tick = guest.wait_tick().n
        second = api.take(str(guest.qmp_path)).wait(120)
    assert store.find("web1@latest").parent == first.id
    assert api.check(store=store, read_data=1.0).findings == ()
    vm = api.restore("web1@latest")
    try:
        assert vm.wait_resident(240)
        assert_goes_on(vm, after_tick=tick)
    finally:
        for one in list_restored():
            one.kill()
    done = api.copy(to=api.init(tmp_path / "folder"))
    assert [one.id for one in done.copied] == [first.id, second.id]
