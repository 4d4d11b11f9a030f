"""A board's nameplate, as others find it in ``/proc``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from stillframe.board.board_command import BoardCommand
from stillframe.board.nameplate import (
    MEMFD_NAME,
    Nameplate,
    PublishedNameplate,
    read_nameplates,
)
from stillframe.errors import NotFoundError, UsageError
from stillframe.machine.finding import find_vm, list_vms, read_vm

SELF = Path(f"/proc/{os.getpid()}")


def plate(name: str, qmp: str | None = "/nowhere/qmp", **changes: object) -> Nameplate:
    command = BoardCommand(guest="ledger", name=name)
    made = Nameplate(
        pid=os.getpid(), name=name, command=command.words(), ram_bytes=1 << 26, qmp=qmp
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def hung() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def hang(stack: ExitStack, nameplate: Nameplate) -> None:
    stack.callback(PublishedNameplate(nameplate).close)


def test_no_plate() -> None:
    assert read_nameplates(SELF) == []
    assert read_vm(os.getpid()) is None


def test_a_board_is_found_by_its_plate(hung: ExitStack) -> None:
    name = f"plate-{os.getpid()}"
    hang(hung, plate(name))
    found = find_vm(name)
    assert (found.pid, found.vmm, found.accelerator) == (os.getpid(), "board", "unicorn")
    assert found.qmp_addresses == ("/nowhere/qmp",)
    assert found.argv == ("stillframe", "board", "run", "ledger", "--ram", "67108864",
                          "--cpus", "1", "--name", name)  # fmt: skip
    assert found.ram_bytes == 1 << 26
    assert abs(found.started_s - time.time()) < 3600 * 24
    assert find_vm(str(os.getpid())) == found
    hung.close()
    with pytest.raises(NotFoundError):
        find_vm(name)


def test_it_cannot_be_changed(hung: ExitStack) -> None:
    hang(hung, plate("sealed"))
    numbers = [number for number in os.listdir(SELF / "fd") if (SELF / "fd" / number).exists()]
    (path,) = (
        SELF / "fd" / number
        for number in numbers
        if os.readlink(SELF / "fd" / number).startswith(f"/memfd:{MEMFD_NAME} ")
    )
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_several_boards_in_one_process(hung: ExitStack) -> None:
    one, two = f"one-{os.getpid()}", f"two-{os.getpid()}"
    hang(hung, plate(one))
    hang(hung, plate(two, qmp="/nowhere/qmp2"))
    assert {vm.name for vm in list_vms() if vm.pid == os.getpid()} == {one, two}
    assert find_vm(two).qmp_addresses == ("/nowhere/qmp2",)
    with pytest.raises(UsageError, match="2 boards"):
        find_vm(str(os.getpid()))


def test_a_board_without_a_monitor(hung: ExitStack) -> None:
    hang(hung, plate("mute", qmp=None))
    with pytest.raises(UsageError, match="no QMP monitor"):
        find_vm(str(os.getpid()))


def test_a_forked_child_is_no_board(hung: ExitStack) -> None:
    hang(hung, plate("parent"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        assert read_nameplates(Path(f"/proc/{child}")) == []
    finally:
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"pid": "x"}', b'{"pid":1,"name":"n"}', b"x" * (1 << 20)],
)
def test_other_peoples_memfds_of_that_name(content: bytes) -> None:
    fd = os.memfd_create(MEMFD_NAME)
    try:
        os.write(fd, content)
        assert read_nameplates(SELF) == []
    finally:
        os.close(fd)


def test_a_process_that_is_gone() -> None:
    assert read_nameplates(Path("/proc/999999999")) == []
