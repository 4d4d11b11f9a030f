"""Where a QMP server listens: who may connect, and whose socket file it is."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from stillframe.errors import BusyError, HostError, UsageError
from stillframe.qmp.listening import Listener, listen
from tests.support.raw_qmp import RawQmp
from tests.unit.board.monitor.conftest import Served


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_our_user_may_connect(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        listener = listen(str(tmp_path / "qmp"))
    finally:
        os.umask(old)
    assert mode(tmp_path / "qmp") == 0o600
    listener.close()


def test_the_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in the moment after bind(2), before anything else can be done about it."""
    seen: list[int] = []

    class Socket(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            seen.append(mode(tmp_path / "qmp"))

    monkeypatch.setattr("socket.socket", Socket)
    old = os.umask(0)
    try:
        listen(str(tmp_path / "qmp")).close()
    finally:
        os.umask(old)
    assert seen == [0o600]


def test_a_stale_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    served = Served(str(path))
    with RawQmp(path) as client:
        client.execute("count")
    assert mode(path) == 0o600
    served.server.close()


def test_a_living_one_is_not(served: Served) -> None:
    with pytest.raises(BusyError, match="somebody listens on"):
        listen(served.address)
    with RawQmp(served.address) as client:
        client.execute("count")


def test_a_living_one_with_a_full_queue_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        full.bind(path)
        full.listen(0)
        waiting.connect(path)
        with pytest.raises(BusyError):
            listen(path)


def test_another_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="is no socket"):
            listen(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"


def test_of_several_that_start_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale file, and all find nobody there; a socket that is bound does not listen yet."""

    class Socket(socket.socket):
        def listen(self, backlog: int = 0) -> None:  # type: ignore[override]
            time.sleep(0.02)
            super().listen(backlog)

    monkeypatch.setattr("socket.socket", Socket)
    path = str(tmp_path / "qmp")
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        got: list[Listener] = []
        refused: list[BusyError] = []

        def start(got: list[Listener] = got, refused: list[BusyError] = refused) -> None:
            try:
                got.append(listen(path))
            except BusyError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 3)
        got[0].close()


def test_closing_takes_the_own_file_away_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    first = listen(str(path))
    path.unlink()
    second = listen(str(path))
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()
    second.close()


def test_a_path_too_long_for_the_kernel(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    served = Served(str(directory / "qmp"))
    assert mode(directory / "qmp") == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        directory_fd = os.open(directory, os.O_PATH)
        client.connect(f"/proc/self/fd/{directory_fd}/qmp")
        os.close(directory_fd)
        client.settimeout(60)
        assert b"QMP" in client.recv(4096)
    served.server.close()
    assert not (directory / "qmp").exists()


def test_where_nobody_can_listen(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        listen(str(tmp_path / "nosuch" / "qmp"))
    for bad in ("", "a\0b", ("127.0.0.1", 70000), ("127.0.0.1", -1)):
        with pytest.raises(UsageError, match="bad monitor address"):
            listen(bad)
    with pytest.raises(HostError):
        listen(("192.0.2.1", 0))


def test_ports(tmp_path: Path) -> None:
    listener = listen(("127.0.0.1", 0))
    host, port = listener.address
    assert host == "127.0.0.1"
    assert isinstance(port, int)
    with pytest.raises(BusyError):
        listen(("127.0.0.1", port))
    listener.close()
