"""A bucket is a place for a store as a folder is: the same suite, against real servers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from stillframe.errors import HostError, SinkError, UnreadableError, UsageError
from stillframe.store.backends import bucket as bucket_module
from stillframe.store.backends.bucket import Bucket
from stillframe.store.opening import make_store, open_store
from tests.contract.test_objects_contract import ObjectsContract, SinkOfObjects
from tests.support_store.lossy_proxy import LossyProxy
from tests.support_store.object_server import ObjectServer, object_server
from tests.support_store.s3_server import BUCKET, S3Server, serving
from tests.support_store.weed_server import WeedServer


@pytest.fixture(scope="module", name="server", params=[ObjectServer, WeedServer])
def _server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    with serving(request.param) as server:
        yield server


class TestBucket(ObjectsContract):
    @pytest.fixture
    def objects(self, server: S3Server) -> Bucket:
        return Bucket(server.url)

    @pytest.fixture
    def again(self, objects: Bucket) -> Bucket:
        return Bucket(objects.description)


class TestSinkOfBucket(SinkOfObjects):
    @pytest.fixture(autouse=True)
    def _bucket(self, server: S3Server) -> None:
        self.url = server.url

    def place(self, tmp_path: Path) -> Bucket:
        return Bucket(self.url)


def test_a_lost_reply_is_no_conflict(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry of a conditional write that had succeeded meets its own object."""
    url = server.url
    lose_once = iter([True])
    with LossyProxy(server.port, lambda method, _: method == "PUT" and next(lose_once, False)) as p:
        monkeypatch.setenv("AWS_ENDPOINT_URL", p.endpoint)
        assert Bucket(url).create("catalog/a", b"ours")
        assert p.lost == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    assert Bucket(url).read("catalog/a") == b"ours"


def test_a_lost_reply_and_somebody_who_was_first(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url
    assert Bucket(url).create("catalog/a", b"theirs")
    lose_once = iter([True])
    with LossyProxy(server.port, lambda method, _: method == "PUT" and next(lose_once, False)) as p:
        monkeypatch.setenv("AWS_ENDPOINT_URL", p.endpoint)
        assert not Bucket(url).create("catalog/a", b"theirs")


def test_parts_go_up_while_more_is_written_and_their_loss_is_mended(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    losses = iter([True, True])

    def loses(method: str, path: str) -> bool:
        if method == "PUT" and "partNumber=" in path:
            seen.append(path)
            return next(losses, False)
        return False

    data = os.urandom(1 << 20) * 40
    with LossyProxy(server.port, loses) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        bucket = Bucket(server.url)
        sink = bucket.sink("snapshots/a")
        sink.write(data[: 36 << 20])
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen, "nothing was uploaded before the commit"
        sink.write(data[36 << 20 :])
        sink.commit()
        assert proxy.lost == 2
        assert bucket.open("snapshots/a").read_at(0, len(data)) == data


def test_what_was_given_up_leaves_no_parts(server: S3Server) -> None:
    bucket = Bucket(server.url)
    sink = bucket.sink("snapshots/a")
    sink.write(bytes(40 << 20))
    sink.abort()
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket=BUCKET)
    assert bucket.listing("") == []


def test_a_bucket_that_is_not_there(server: S3Server) -> None:
    nowhere = Bucket("s3://no-such-bucket/x")
    with pytest.raises(SinkError, match="cannot write s3://no-such-bucket/x/a"):
        nowhere.create("a", b"")
    sink = nowhere.sink("b")
    with pytest.raises(SinkError, match="cannot write s3://no-such-bucket/x/b"):
        sink.commit()


def test_a_bucket_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
    monkeypatch.setattr(bucket_module, "RETRIES", retries)
    with object_server() as server:
        bucket = Bucket(server.url)
        bucket.create("catalog/a", b"one")
        source = bucket.open("catalog/a")
        sink = bucket.sink("snapshots/a")
        server.stop()
        with pytest.raises(UnreadableError, match="cannot read s3://"):
            source.read_at(0, 3)
        with pytest.raises(HostError, match="cannot list s3://"):
            bucket.listing("")
        with pytest.raises(SinkError, match="cannot write s3://"):
            bucket.create("catalog/b", b"")
        with pytest.raises(SinkError, match="cannot write s3://"):  # noqa: PT012 - either may
            sink.write(bytes(100 << 20))
            sink.commit()


@pytest.mark.parametrize("url", ["ftp://a/b", "s3:/a", "/folder"])
def test_no_place_for_a_store(url: str) -> None:
    with pytest.raises(UsageError, match="is no place for a store"):
        Bucket(url)


def test_a_key_stays_below_its_prefix(server: S3Server) -> None:
    with pytest.raises(UsageError):
        Bucket(server.url).create("../x", b"")


def test_profiles_of_the_aws_command_line(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in server.environment:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile mine]\nendpoint_url = {server.endpoint}\n")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    secrets = "".join(f"{name.lower()} = {server.environment[name]}\n" for name in names)
    (tmp_path / "credentials").write_text(f"[mine]\n{secrets}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert Bucket(server.url).create("a", b"")


@pytest.mark.parametrize("server", [ObjectServer], indirect=True)
def test_a_server_without_conditional_writes_holds_no_store(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator checks no signature, so that the header that makes them can be left out."""
    url = server.url
    with LossyProxy(server.port, without=["If-None-Match"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(HostError, match="can be no store: it writes over"):
            make_store(url)
        assert Bucket(url).listing("") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    assert open_store(make_store(url).description).list() == []


def test_without_the_extra_a_wrong_url_is_still_told_as_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match="is no place for a store"):
        Bucket("ftp://a/b")
    with pytest.raises(UsageError, match="needs the extra 'objects'"):
        Bucket("s3://a/b")
