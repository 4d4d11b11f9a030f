"""Increments whose parents are in a bucket, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from stillframe import api
from stillframe.cli.main import main
from stillframe.errors import LockedError
from stillframe.store import keys as keys_room
from stillframe.store.keys import Keys, make_key
from stillframe.store.opening import make_store
from stillframe.store.records import data_key
from tests.support_store.object_server import object_server
from tests.support_store.s3_server import S3Server
from tests.support_store.stores import put


@pytest.fixture(scope="module", name="server")
def _server() -> Iterator[S3Server]:
    with object_server() as server:
        yield server


def test_an_increment_of_an_encrypted_bucket_is_opened_by_name(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its parent is says the catalog, which is sealed."""
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    store = make_store(server.url, key=make_key(passphrase="pass"))
    first = put(store)
    second = put(store, parent=first, created="2026-02-01T00:00:00+00:00")
    keys = Keys(passphrase="pass")
    monkeypatch.setenv("STILLFRAME_STORE", store.description)
    with api.open("web1@latest", keys=keys) as snapshot:
        assert [file.id for file in snapshot.files] == [second.id, first.id]
        assert snapshot.verify().data_pages == 8
    with pytest.raises(LockedError):
        api.open("web1@latest", keys=Keys(passphrase="word"))


def test_parents_may_be_in_a_bucket(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by their URLs, of which the variable holds several, apart by colons."""
    store = make_store(server.url)
    first = put(store)
    second = put(store, parent=first)
    file = tmp_path / "second.still"
    with closing(store.backend.open(data_key(second.name))) as source:
        file.write_bytes(source.read_at(0, source.size_bytes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLFRAME_PARENTS", "/nowhere")
    assert main(["verify", "second.still", "-q"]) == 9
    assert main(["verify", "second.still", "-q", "--parent-dir", store.location(first)]) == 0
    monkeypatch.setenv("STILLFRAME_PARENTS", f"/nowhere:{store.location(first)}:/elsewhere")
    with api.open("second.still") as snapshot:
        assert snapshot.files[1].source.description == store.location(first)
