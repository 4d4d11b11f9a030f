"""Encrypted snapshots of a real guest: nothing readable in the file, and everything works."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyrage.x25519
import pytest

from guests.qemu import GuestVm
from guests.serial import SerialConsole
from stillframe.errors import LockedError
from stillframe.image.filling import Filling
from stillframe.restore.restored import list_restored
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from stillframe.store.keys import Keys
from tests.integration.cli.program import run
from tests.support.image_killing import kill_filler
from tests.support.image_vm import image_vms

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("places")]
FILL_S = 60.0


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "key.txt"
    path.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    return path


@pytest.fixture(scope="module")
def sealed(
    guest: GuestVm, identity: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Keys]:
    """An encrypted snapshot of the guest, not compressed; what opens it."""
    directory = tmp_path_factory.mktemp("sealed")
    file, word = directory / "x.still", directory / "word"
    word.write_text("correct horse\n")
    recipient = pyrage.x25519.Identity.from_str(identity.read_text().strip()).to_public()
    done = run(
        "take", guest.name, "-o", file, "--compression", "none", "-q",
        "--encrypt", "--password-file", word, "--recipient", recipient,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return file, Keys(identities=[identity])


def words_of(snapshot: Snapshot, guest: GuestVm) -> dict[str, bytes]:
    """What somebody would look for in the file."""
    record = snapshot.manifest.machine
    assert record is not None
    block = max(snapshot.blocks, key=lambda one: one.used_length_bytes).idstr
    pages = (content for _, content in snapshot.iter_pages(block) if content is not None)
    return {f"page {n}": next(pages)[:48] for n in range(8)} | {
        "name": guest.name.encode(),
        "program": record.argv[0].encode(),
        "directory": str(guest.directory).encode(),
        "block": b"pc.bios",
        "device": b"mc146818rtc",
        "kernel": b"Linux version",
    }


def test_nothing_of_the_guest_is_readable(
    guest: GuestVm, sealed: tuple[Path, Keys], tmp_path: Path
) -> None:
    file, keys = sealed
    with open_snapshot(file, keys) as snapshot:
        assert snapshot.was_taken_here
        words = words_of(snapshot, guest)
    content = file.read_bytes()
    assert [name for name, word in words.items() if word in content] == []
    plain = tmp_path / "plain.still"  # the same search finds them where nothing is encrypted
    assert run("take", guest.name, "-o", plain, "--compression", "none", "-q").returncode == 0
    found = plain.read_bytes()
    wanted = ("name", "directory", "block", "kernel")
    assert [name for name in wanted if words[name] not in found] == []


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_a_restored_guest_goes_on(
    sealed: tuple[Path, Keys], identity: Path, options: tuple[str, ...]
) -> None:
    file, _ = sealed
    done = run("restore", file, "--identity", identity, "--json", "--wait", *options)
    assert done.returncode == 0, done.stderr
    assert_goes_on(json.loads(done.stdout))


def test_clones_run_by_the_passphrase(sealed: tuple[Path, Keys]) -> None:
    file, _ = sealed
    done = run(
        "fork", file, "-n", "2", "--json", env=os.environ | {"STILLFRAME_PASSWORD": "correct horse"}
    )
    assert done.returncode == 0, done.stderr
    for shown in json.loads(done.stdout):
        assert_goes_on(shown)
    # The key is on no command line, nor in what is written about the VMs.
    for vm in list_restored():
        assert vm.wait_resident(FILL_S, Keys(passphrase="correct horse").unlock)


def test_an_heir_has_the_key(sealed: tuple[Path, Keys], tmp_path: Path) -> None:
    file, keys = sealed
    with image_vms(file, tmp_path / "vms", unlock=keys.unlock) as vms:
        filling = vms.start(paused=True, working_set=False)
        first = filling.hand_over(log_path=tmp_path / "log", heir=True)
        secret = keys.unlock(header_of(file))
        assert secret.hex() not in Path(f"/proc/{first}/cmdline").read_text()
        kill_filler(first)
        deadline = time.monotonic() + FILL_S
        while vms.record_path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not vms.record_path.exists(), (tmp_path / "log").read_text()
        assert vms.differences() == []


def test_without_the_key_nobody_goes_on(sealed: tuple[Path, Keys], tmp_path: Path) -> None:
    file, keys = sealed
    with image_vms(file, tmp_path / "vms", unlock=keys.unlock) as vms:
        vms.start(paused=True, working_set=False).close()
        with pytest.raises(LockedError):
            Filling.adopt(vms.record_path)
        filling = Filling.adopt(vms.record_path, keys.unlock)
        assert filling.wait(FILL_S)
        assert vms.differences() == []


def test_an_encrypted_store(
    guest: GuestVm, identity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second snapshot is an increment; a restore from it, and nothing to read in the folder."""
    place = tmp_path / "store"
    monkeypatch.setenv("STILLFRAME_STORE", str(place))
    recipient = pyrage.x25519.Identity.from_str(identity.read_text().strip()).to_public()
    opens = ("--identity", identity)
    assert run("init", "--recipient", recipient).returncode == 0
    assert run("take", guest.name, "-q").returncode == 12
    for _ in range(2):
        done = run("take", guest.name, "-q", *opens)
        assert done.returncode == 0, done.stderr
    shown = json.loads(run("show", f"{guest.name}@latest", "--json", *opens).stdout)
    assert shown["encrypted"]
    assert shown["parent"] is not None
    done = run("restore", f"{guest.name}@latest", "--json", "--wait", *opens)
    assert done.returncode == 0, done.stderr
    assert_goes_on(json.loads(done.stdout))
    done = run("watch", guest.qmp_path, "--every", "1s", "--count", "1", "-q", *opens)
    assert done.returncode == 0, done.stderr
    words = (guest.name.encode(), str(guest.directory).encode(), b"pc.bios", b"mc146818rtc")
    for path in filter(Path.is_file, place.rglob("*")):
        content = path.read_bytes()
        assert [word for word in words if word in content or word in path.name.encode()] == []
    assert run("check", *opens).returncode == 0


def test_what_was_changed_reaches_no_vm(
    sealed: tuple[Path, Keys], identity: Path, tmp_path: Path
) -> None:
    """Also one whole frame in the place of another, which needs no key."""
    file, keys = sealed
    with open_snapshot(file, keys) as snapshot:
        frames = [snapshot.index.frame(n) for n in range(snapshot.index.frame_count)]
    head = frames[0]
    with changed(file, tmp_path / "changed.still") as there:
        there[head.offset_bytes + head.stored_bytes // 2] ^= 1
    refused(tmp_path / "changed.still", identity)
    length = Counter(frame.stored_bytes for frame in frames[1:]).most_common(1)[0][0]
    one, two = [frame for frame in frames[1:] if frame.stored_bytes == length][:2]
    with changed(file, tmp_path / "changed.still") as there:
        content = bytes(there[one.offset_bytes :][:length])
        there[one.offset_bytes : one.offset_bytes + length] = there[two.offset_bytes :][:length]
        there[two.offset_bytes : two.offset_bytes + length] = content
    refused(tmp_path / "changed.still", identity, "--stream")
    refused(tmp_path / "changed.still", identity, "--wait")


def header_of(file: Path) -> Any:
    """What the file tells without a key."""
    seen: list[Any] = []

    def look(header: Any) -> bytes:
        seen.append(header)
        return bytes(32)

    with pytest.raises(LockedError):
        open_snapshot(file, look)
    return seen[0]


@contextmanager
def changed(file: Path, to: Path) -> Iterator[bytearray]:
    content = bytearray(file.read_bytes())
    yield content
    to.write_bytes(content)


def refused(file: Path, identity: Path, *options: str) -> None:
    """No VM is there after it, and it is one line."""
    done = run("restore", file, "--identity", identity, "--trust", "-q", *options)
    assert done.returncode == 8, done.stderr
    assert done.stderr.count(b"\n") == 1
    assert list_restored() == []


def assert_goes_on(shown: dict[str, Any]) -> None:
    line = SerialConsole(next(Path(path) for path in shown["sockets"] if "serial" in path))
    try:
        assert line.is_progressing()
        assert line.command("audit").startswith("audit ok ")
    finally:
        line.close()
