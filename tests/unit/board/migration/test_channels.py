"""Ways out and in: files, descriptors, sockets; what ends them, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from stillframe.board.migration.addresses import parse_uri
from stillframe.board.migration.incoming_channel import Arrival, expect
from stillframe.board.migration.interruptible import Interrupt
from stillframe.board.migration.outgoing_channel import OutgoingChannel, find_destination
from stillframe.board.monitor.descriptors import Descriptors
from stillframe.errors import HostError, NotFoundError, SinkError, StillframeError, UsageError
from tests.support_store.small import small_file

NONE = Descriptors()


class Handed:
    """Descriptors as a client hands them over."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take(self, name: str) -> int:
        assert name == "mig"
        return self.fd

    def open_fdset(self, fdset_id: int, flags: int) -> int:
        assert fdset_id == 3
        return os.dup(self.fd)


def departed(uri: str, interrupt: Interrupt | None = None, fds: object = NONE) -> OutgoingChannel:
    return find_destination(parse_uri(uri), fds, interrupt or Interrupt()).open()  # type: ignore[arg-type]


def arrived(uri: str, interrupt: Interrupt | None = None, fds: object = NONE) -> Arrival:
    return expect(parse_uri(uri), fds, interrupt or Interrupt())  # type: ignore[arg-type]


def test_a_file_has_no_name_before_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "a"
    channel = departed(f"file:{file}")
    channel.write(b"one")
    assert os.listdir(tmp_path) == []
    channel.commit()
    channel.abort()
    assert file.read_bytes() == b"one"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert channel.return_path is None
    given_up = departed(f"file:{file}")
    given_up.write(b"two")
    given_up.abort()
    assert file.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SinkError):
        departed(f"file:{tmp_path}/none/a")
    with pytest.raises(UsageError):
        departed(f"file:{tmp_path}/a,offset=4096")
    with pytest.raises(UsageError):
        departed(f"file:{tmp_path}")
    with pytest.raises(NotFoundError):
        arrived(f"file:{tmp_path}/a")
    with pytest.raises(NotFoundError):
        departed("fd:mig")
    with pytest.raises(NotFoundError):
        arrived("file:/dev/fdset/3")


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError):
        arrived(f"file:{tmp_path}/pipe")


def test_a_file_within_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"before" + bytes(100))
    fd = os.open(file, os.O_RDWR)
    channel = departed("file:/dev/fdset/3,offset=6", fds=Handed(fd))
    channel.write(b"stream")
    channel.commit()
    channel.abort()
    assert file.read_bytes() == b"beforestream"
    incoming = arrived("file:/dev/fdset/3,offset=6", fds=Handed(fd)).open()
    assert incoming is not None
    assert incoming.read(100) == b"stream"
    assert not incoming.can_reply
    incoming.close()
    os.close(fd)


@pytest.mark.parametrize("kind", ["unix", "tcp", "socketpair"])
def test_sockets_speak_both_ways(tmp_path: Path, kind: str) -> None:
    if kind == "socketpair":
        ours, theirs = socket.socketpair()
        arrival = arrived("fd:mig", fds=Handed(theirs.detach()))
        channel = departed("fd:mig", fds=Handed(ours.detach()))
        assert arrival.socket_address is None
    else:
        path = tmp_path / "s"
        arrival = arrived(f"unix:{path}" if kind == "unix" else "tcp:127.0.0.1:0")
        address = arrival.socket_address
        assert address is not None
        if kind == "unix":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert address == {"type": "unix", "path": str(path)}
            channel = departed(f"unix:{path}")
        else:
            assert address["type"] == "inet"
            channel = departed(f"tcp:127.0.0.1:{address['port']}")
    incoming = arrival.open()
    assert incoming is not None
    assert not (tmp_path / "s").exists(), "one source only"
    channel.write(b"to")
    assert incoming.read(10) == b"to"
    incoming.reply(b"fro")
    assert channel.return_path is not None
    assert channel.return_path.read(10) == b"fro"
    channel.abort()
    assert incoming.read(10) == b""
    incoming.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(SinkError) as caught:
        departed(f"unix:{tmp_path}/s")
    assert str(caught.value) == f"Failed to connect to '{tmp_path}/s': No such file or directory"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SinkError) as caught:
        departed(f"tcp:127.0.0.1:{port}")
    assert str(caught.value).endswith("Connection refused")


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    first = arrived(f"unix:{tmp_path}/s")
    with pytest.raises(StillframeError):
        arrived(f"unix:{tmp_path}/s")
    first.close()
    arrived(f"unix:{tmp_path}/s").close()
    (tmp_path / "f").write_text("mine")
    with pytest.raises(StillframeError):
        arrived(f"unix:{tmp_path}/f")
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.parametrize("kind", ["unix", "pipe"])
def test_an_interrupt_ends_a_write_that_waits(tmp_path: Path, kind: str) -> None:
    interrupt = Interrupt()
    if kind == "unix":
        arrival = arrived(f"unix:{tmp_path}/s")
        channel = departed(f"unix:{tmp_path}/s", interrupt)
    else:
        reader, writer = os.pipe()
        channel = departed("fd:mig", interrupt, Handed(writer))
    threading.Timer(0.05, interrupt.set).start()
    with pytest.raises(SinkError) as caught:
        channel.write(bytes(64 << 20))
    assert "cancelled" in str(caught.value)
    channel.abort()
    if kind == "unix":
        arrival.close()
    else:
        os.close(reader)


def test_an_interrupt_ends_waiting_for_the_source(tmp_path: Path) -> None:
    interrupt = Interrupt()
    arrival = arrived(f"unix:{tmp_path}/s", interrupt)
    threading.Timer(0.05, interrupt.set).start()
    assert arrival.open() is None
    arrival.close()
    interrupt = Interrupt()
    arrival = arrived(f"unix:{tmp_path}/s", interrupt)
    channel = departed(f"unix:{tmp_path}/s")
    incoming = arrival.open()
    assert incoming is not None
    threading.Timer(0.05, interrupt.set).start()
    assert incoming.read(1) == b""
    channel.abort()
    incoming.close()


def test_a_destination_that_hung_up(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    channel = departed("fd:mig", fds=Handed(writer))
    os.close(reader)
    with pytest.raises(SinkError) as caught:
        channel.write(b"x")
    assert str(caught.value) == "Unable to write to file descriptor: Broken pipe"
    channel.abort()


def test_a_file_that_says_it_is_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "a.still").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(40))
    arrival = arrived(f"file:{tmp_path}/a.still")
    with pytest.raises(StillframeError) as caught:
        arrival.open()
    assert "/proc/" not in str(caught.value)


def test_a_damaged_snapshot_is_called_by_its_name(tmp_path: Path) -> None:
    content = bytearray(small_file())
    content[len(content) // 3] ^= 1
    (tmp_path / "a.still").write_bytes(content)
    channel = arrived(f"file:{tmp_path}/a.still").open()
    assert channel is not None
    with pytest.raises(StillframeError) as caught:
        list(iter(lambda: channel.read(1 << 20), b""))
    channel.close()
    assert f"{tmp_path}/a.still" in str(caught.value)
    assert "/proc/" not in str(caught.value)


def test_it_cannot_be_listened_on() -> None:
    with pytest.raises(HostError):
        arrived("tcp:203.0.113.7:1")
