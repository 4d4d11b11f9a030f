"""Descriptors handed to a QMP server: named ones, sets, and what nobody asked for."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest

from stillframe.board.monitor.descriptors import (
    ClientDescriptors,
    FdSets,
    InheritedDescriptors,
)
from stillframe.errors import NotFoundError
from stillframe.qmp.client import QmpClient
from tests.support.raw_qmp import RawQmp
from tests.unit.board.monitor.conftest import Served

NONE_CAME = ("GenericError", "No file descriptor supplied via SCM_RIGHTS")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def holders(fd: int) -> int:
    """How many descriptors of this process are of the same file."""
    wanted = os.fstat(fd).st_ino
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.stat(f"/proc/self/fd/{name}").st_ino == wanted
        except OSError:
            continue
    return count


def wait_until_held(fd: int, count: int) -> None:
    deadline_s = time.monotonic() + 60
    while holders(fd) != count:
        assert time.monotonic() < deadline_s, holders(fd)
        time.sleep(0.005)


def test_sets(served: Served, memfd: int) -> None:
    with RawQmp(served.address) as client, RawQmp(served.address) as other:
        assert client.error("add-fd") == NONE_CAME
        first = client.execute("add-fd", {"opaque": "mine"}, fds=(memfd,))
        second = client.execute("add-fd", {"fdset-id": 7}, fds=(memfd,))
        third = client.execute("add-fd", {"fdset-id": 7, "opaque": "x"}, fds=(memfd,))
        fourth = client.execute("add-fd", {}, fds=(memfd,))
        assert [one["fdset-id"] for one in (first, second, third, fourth)] == [0, 7, 7, 1]
        assert holders(memfd) == 5
        assert other.execute("query-fdsets") == [
            {"fdset-id": 0, "fds": [{"fd": first["fd"], "opaque": "mine"}]},
            {"fdset-id": 1, "fds": [{"fd": fourth["fd"]}]},
            {
                "fdset-id": 7,
                "fds": [{"fd": third["fd"], "opaque": "x"}, {"fd": second["fd"]}],
            },
        ]
        other.execute("remove-fd", {"fdset-id": 7, "fd": second["fd"]})
        other.execute("remove-fd", {"fdset-id": 0})
        assert holders(memfd) == 3
        assert client.error("remove-fd", {"fdset-id": 0}) == (
            "GenericError", "File descriptor named 'fdset-id:0' not found",
        )  # fmt: skip
        assert client.error("remove-fd", {"fdset-id": 7, "fd": 1}) == (
            "GenericError", "File descriptor named 'fdset-id:7, fd:1' not found",
        )  # fmt: skip
        reply = client.command("add-fd", {"fdset-id": -1}, fds=(memfd,))
        assert reply["error"]["desc"] == "Parameter 'fdset-id' expects a non-negative value"
        assert holders(memfd) == 3
    wait_until_held(memfd, 1)  # the last client is gone, and with it the sets


def test_named_ones(served: Served, memfd: int) -> None:
    with RawQmp(served.address) as client, RawQmp(served.address) as other:
        assert client.error("getfd", {"fdname": "a"}) == NONE_CAME
        client.execute("getfd", {"fdname": "a"}, fds=(memfd,))
        client.execute("getfd", {"fdname": "a"}, fds=(memfd,))
        assert holders(memfd) == 2
        reply = client.command("getfd", {"fdname": "1a"}, fds=(memfd,))
        assert reply["error"]["desc"] == (
            "Parameter 'fdname' expects a name not starting with a digit"
        )
        assert holders(memfd) == 2
        not_found = ("GenericError", "File descriptor named 'a' not found")
        assert other.error("closefd", {"fdname": "a"}) == not_found
        client.execute("closefd", {"fdname": "a"})
        assert client.error("closefd", {"fdname": "a"}) == not_found
        assert holders(memfd) == 1
        client.execute("getfd", {"fdname": "b"}, fds=(memfd,))
    wait_until_held(memfd, 1)


def test_a_command_takes_the_first_that_came_last(served: Served, memfd: int) -> None:
    with RawQmp(served.address) as client:
        client.send(b" ", fds=(memfd, memfd, memfd))
        wait_until_held(memfd, 4)
        client.send(b" ", fds=(memfd, memfd))
        wait_until_held(memfd, 3)
        client.execute("take")
        assert holders(memfd) == 2
        assert client.error("take") == NONE_CAME
        assert not os.get_inheritable(served.taken[0])
        os.close(served.taken[0])
        client.send(b" ", fds=(memfd,) * 16)
        wait_until_held(memfd, 17)
    wait_until_held(memfd, 1)


def test_too_many_at_once_are_closed(served: Served, memfd: int) -> None:
    with RawQmp(served.address) as client:
        client.send(b" ", fds=(memfd,) * 100)
        client.execute("take")
        os.close(served.taken[0])
        assert holders(memfd) == 1


def test_our_client_s_way(served: Served, memfd: int) -> None:
    with QmpClient.connect(served.address) as client:
        added = client.add_fd(memfd)
        assert added.path == "/dev/fdset/0"
        assert holders(memfd) == 2
        client.remove_fd(added)
        assert holders(memfd) == 1


def test_opening_by_name(memfd: int, tmp_path: os.PathLike[str]) -> None:
    fds = ClientDescriptors(FdSets())
    write_only = os.open(f"/proc/self/fd/{memfd}", os.O_WRONLY)
    fds.sets.add(write_only, 3, None)
    opened = fds.open_file("/dev/fdset/3", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(opened, b"abc")
    assert os.pread(memfd, 9, 0) == b"abc"
    assert not os.get_inheritable(opened)
    os.close(opened)
    for path, flags, number in (
        ("/dev/fdset/3", os.O_RDONLY, errno.EACCES),
        ("/dev/fdset/3", os.O_RDWR, errno.EACCES),
        ("/dev/fdset/4", os.O_WRONLY, errno.ENOENT),
        ("/dev/fdset/x", os.O_WRONLY, errno.EINVAL),
        ("/dev/fdset/", os.O_WRONLY, errno.EINVAL),
        ("/nosuch/x", os.O_WRONLY, errno.ENOENT),
        ("a\0b", os.O_WRONLY, errno.EINVAL),
    ):
        with pytest.raises(OSError) as caught:
            fds.open_file(path, flags)
        assert caught.value.errno == number, path
    plain = fds.open_file(str(tmp_path / "x"), os.O_WRONLY | os.O_CREAT, 0o600)  # type: ignore[operator]
    os.close(plain)
    fds.sets.clear()
    assert holders(memfd) == 1


def test_what_a_migration_asks_for(memfd: int) -> None:
    fds = ClientDescriptors(FdSets())
    fds.receive([os.dup(memfd)])
    fds.keep("a")
    fd = fds.take("a")
    os.close(fd)
    with pytest.raises(NotFoundError, match="'a' has not been found"):
        fds.take("a")
    fds.sets.add(os.dup(memfd), None, None)
    os.close(fds.open_fdset(0, os.O_RDWR))
    with pytest.raises(NotFoundError, match="Permission denied"):
        fds.open_fdset(0, os.O_RDONLY)
    with pytest.raises(NotFoundError, match="No such file"):
        fds.open_fdset(1, os.O_RDWR)
    fds.sets.clear()
    fds.close()
    assert holders(memfd) == 1


def test_a_number_of_thousands_of_digits_is_none() -> None:
    with pytest.raises(OSError) as caught:
        ClientDescriptors(FdSets()).open_file("/dev/fdset/" + "9" * 5000, os.O_RDONLY)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(NotFoundError):
        InheritedDescriptors().take("9" * 5000)
