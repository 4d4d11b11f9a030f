"""A store in a bucket of SeaweedFS and real QEMUs: take into it, and start VMs straight from it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.errors import HostError, SinkError
from stillframe.restore import restored as restored_room
from stillframe.restore.restored import list_restored
from stillframe.store import keys as keys_room
from stillframe.store import open_snapshot, removing
from stillframe.store.backends import bucket as bucket_module
from stillframe.store.compaction import give_whole_form
from stillframe.store.opening import make_store
from stillframe.store.retention import Policy
from stillframe.store.store import Store
from tests.integration.test_fork import assert_goes_on
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.taking import command
from tests.support_store.chains import ram_of
from tests.support_store.object_server import object_server
from tests.support_store.s3_server import S3Server
from tests.support_store.stores import put
from tests.support_store.weed_server import weed_server

pytestmark = pytest.mark.qemu
NAME = "web1"


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=192, populate_mib=32, tick_ms=50, name=NAME).start() as vm:
        yield vm


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with weed_server() as server:
        yield server


@pytest.fixture
def store(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The default store; VMs that were restored end with the test."""
    monkeypatch.setenv("STILLFRAME_STORE", server.url)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(restored_room, "ROOTS_RUN", tmp_path / "stillframe")  # not others' VMs
    tmp_path.chmod(0o700)
    yield api.init()
    for vm in list_restored():
        vm.kill()


def test_taken_into_a_bucket_and_started_from_it(
    guest: GuestVm, store: Store, tmp_path: Path
) -> None:
    first = api.take(str(guest.qmp_path), tags=["first"]).wait(120)
    tick = guest.wait_tick().n
    second = api.take(str(guest.qmp_path)).wait(120)
    entry = store.find(f"{NAME}@latest")
    assert (entry.id, entry.parent) == (second.id, first.id)
    assert api.check(store=store, read_data=1.0).findings == ()
    with api.open(f"{NAME}@latest") as snapshot:
        ram = {
            block.idstr: b"".join(
                snapshot.read_page(block.idstr, page)
                for page in range(0, block.used_length_bytes >> 12, 97)
            )
            for block in snapshot.blocks
        }
    vm = api.restore(f"{NAME}@latest")
    assert vm.wait_resident(240)
    assert_goes_on(vm, after_tick=tick)
    vm.kill()
    clones = api.fork(f"{NAME}@first", 2, wait=True)
    assert_goes_on(clones[1])

    folder = api.init(tmp_path / "folder")
    done = api.copy(to=folder)
    assert [one.id for one in done.copied] == [first.id, second.id]
    assert api.copy(to=folder).copied == ()
    assert folder.find(f"{NAME}@first").id == first.id
    assert api.check(store=folder, read_data=1.0).findings == ()
    with folder.open(folder.find(second.id)) as copied:
        for name, content in ram.items():
            pages = range(len(content) >> 12)
            assert content == b"".join(copied.read_page(name, 97 * page) for page in pages)
    back = api.init(f"{store.description}-again")
    api.copy(second.id, store=folder, to=back)
    assert back.find(second.id).parent == first.id
    assert api.check(store=back).findings == ()


def test_the_command_line_takes_urls(guest: GuestVm, server: S3Server, store: Store) -> None:
    url = server.url
    newest = f"{NAME}@latest"
    for words in (
        ["init", url],
        ["take", str(guest.qmp_path), "--store", url, "--json"],
        *([*words, "--store", url] for words in (["ls"], ["verify", newest], ["check"])),
        ["copy", "--store", url, "--to", store.description],
        ["show", newest],
    ):
        done = subprocess.run(
            command(*words), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_a_snapshot_in_a_bucket_without_a_store(
    guest: GuestVm, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    url = f"{server.url}/x.still"
    for words, code, said in (
        (["take", str(guest.qmp_path), "-o", url], 0, ""),
        (["take", str(guest.qmp_path), "-o", url], 2, "exists already; choose another name"),
        (["take", str(guest.qmp_path), "-o", url, "--force"], 2, "are not replaced"),
        (["verify", url], 0, ""),
        (["export", url, "-o", f"{url}.stream", "--format", "qemu"], 0, ""),
        (["export", url, "-o", str(tmp_path / "x.stream"), "--format", "qemu"], 0, ""),
        (["import", str(tmp_path / "x.stream"), "-o", f"{url}.imported"], 0, ""),
        (["verify", f"{url}.imported"], 0, ""),
        (["take", str(guest.qmp_path), "-o", "s3://bucket"], 2, "names no object"),
        (["restore", "s3://bucket/"], 2, "names no object"),
    ):
        done = subprocess.run(
            command(*words), capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(bucket_module, "RETRIES", {"max_retries": 0})
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(HostError):  # nobody knows whether there is one
            api.take(guest.pid, f"{server.url}/y.still")
    tick = guest.wait_tick().n
    vm = api.restore(url, wait=True)
    try:
        assert_goes_on(vm)
    finally:
        vm.kill()
    assert guest.wait_tick().n > tick


def test_a_bucket_that_vanishes_while_it_is_written(
    guest: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "RETRIES", {"max_retries": 1})
    with object_server() as server:
        store = api.init(server.url)
        job = api.take(str(guest.qmp_path), store=store, max_bandwidth_bytes_per_s=8 << 20)
        while job.stats.phase != "saving":
            assert not job.done(), job.wait()
        server.stop()
        with pytest.raises((SinkError, HostError)) as failed:
            job.wait(120)
    assert failed.value.guest_state == "running"
    assert guest.is_progressing()


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_chain_is_compacted_in_it(
    encrypted: bool, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two at once; read by URL, as a restore does; its parents go a day later."""
    monkeypatch.setattr(keys_room, "SCRYPT_LOG_N", 4)
    keys = api.Keys(passphrase="pass")
    key = api.make_key(passphrase="pass") if encrypted else None
    store = make_store(f"{server.url}/compacted-{encrypted}", key=key)
    chain = [put(store)]
    for number in range(3, 6):
        created = f"2026-01-0{number}T00:00:00+00:00"
        chain.append(put(store, created=created, parent=chain[-1], pages={(0, number): None}))
    with store.open(chain[-1]) as snapshot:
        ram = ram_of(snapshot)
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(give_whole_form, store, chain[2]) for _ in range(2)]
        assert sum(one.result() is not None for one in tries) == 1
    assert api.check(store=store, read_data=1.0).findings == ()
    for days, left in ((1, 4), (-1, 2)):
        monkeypatch.setattr(removing, "GIVEN_UP_S", days * 24 * 3600.0)
        store.prune(Policy(last=2))
        assert [one.id for one in store.list()] == [one.id for one in chain[-left:]]
        for entry, files in zip(chain[2:], (1, 2), strict=True):
            with open_snapshot(store.location(entry), keys if encrypted else None) as snapshot:
                assert (snapshot.id, len(snapshot.files)) == (entry.id, files)
                assert snapshot.verify().missing_pages == 0
        with store.open(chain[-1]) as snapshot:
            assert ram_of(snapshot) == ram
    assert api.check(store=store, read_data=1.0).findings == ()
