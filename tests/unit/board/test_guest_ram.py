"""Guest RAM of this process, without protection."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.errors import HostError, UsageError

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    block = GuestRam("board.ram", MIB + 3 * PAGE)
    yield block
    block.close()


def test_it_is_zero_and_unpopulated_at_first(ram: GuestRam) -> None:
    assert os.fstat(ram.fd).st_blocks == 0
    assert ram.read(MIB, 3 * PAGE) == bytes(3 * PAGE)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_written_is_read(ram: GuestRam, kind: type) -> None:
    ram.write(5, kind(b"abc" * 2000))
    assert ram.read(4, 6002) == b"\0" + b"abc" * 2000 + b"\0"
    assert os.pread(ram.fd, 6, 5) == b"abcabc"
    ram.write(ram.length_bytes - 1, kind(b"z"))
    assert ram.read(ram.length_bytes - 2, 2) == b"\0z"
    ram.write(ram.length_bytes, kind(b""))


def test_a_word_view_is_written_as_its_bytes(ram: GuestRam) -> None:
    ram.write(8, memoryview(bytes(range(16))).cast("Q"))
    assert ram.read(8, 16) == bytes(range(16))


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 4), (MIB + 3 * PAGE, 1), (0, MIB + 3 * PAGE + 1), (0, -1)]
)
def test_nothing_outside_the_block_is_touched(ram: GuestRam, offset: int, length: int) -> None:
    with pytest.raises(UsageError, match=r"board\.ram"):
        ram.read(offset, length)
    with pytest.raises(UsageError, match=r"board\.ram"):
        ram.read_from(0, offset, length)
    with pytest.raises(UsageError, match=r"board\.ram"):
        ram.clear(offset, length)
    with pytest.raises(UsageError, match=r"board\.ram"):
        ram.touch(offset, length)
    if length > 0:
        with pytest.raises(UsageError, match=r"board\.ram"):
            ram.write(offset, bytes(length))


def test_the_kernel_reads_a_file_into_it(ram: GuestRam) -> None:
    fd = os.open(__file__, os.O_RDONLY)
    content = os.pread(fd, 1 << 16, 0)
    assert ram.read_from(fd, 100, PAGE, 50) == len(content[50 : 50 + PAGE])
    assert ram.read(100, 200) == content[50:250]
    assert ram.read_from(fd, 0, PAGE, len(content)) == 0
    assert ram.read_from(fd, 0, 40) == 40
    assert ram.read_from(fd, 40, 40) == 40
    assert ram.read(0, 80) == content[:80]
    os.close(fd)
    with pytest.raises(OSError, match="descriptor"):
        ram.read_from(fd, 0, 40)


def test_a_stream_gives_what_it_has(ram: GuestRam) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.send(b"hello")
        assert ram.read_from(right.fileno(), 7, MIB) == 5
    assert ram.read(7, 6) == b"hello\0"


def test_cleared_pages_are_zero_and_give_their_memory_back(ram: GuestRam) -> None:
    ram.write(0, b"x" * MIB)
    before = os.fstat(ram.fd).st_blocks
    ram.clear(PAGE, 16 * PAGE)
    ram.clear(0, 0)
    assert os.fstat(ram.fd).st_blocks == before - 16 * PAGE // 512
    assert ram.read(0, 17 * PAGE + 1) == b"x" * PAGE + bytes(16 * PAGE) + b"x"


def test_touching_populates_and_changes_nothing(ram: GuestRam) -> None:
    ram.write(PAGE, b"abcdefgh")
    ram.touch(PAGE + 5, PAGE)
    assert ram.read(PAGE, 9) == b"abcdefgh\0"
    assert os.fstat(ram.fd).st_blocks == 2 * PAGE // 512


def test_the_record_has_room_for_whole_chunks(ram: GuestRam) -> None:
    block = ram.block()
    assert (block.hva, block.backing_fd, block.shared) == (ram.hva, ram.fd, True)
    assert block.pages * PAGE == ram.length_bytes
    assert block.max_length_bytes == MIB + (64 << 10)


@pytest.mark.parametrize("length", [0, -PAGE, PAGE + 1])
def test_odd_lengths_are_refused(length: int) -> None:
    with pytest.raises(UsageError, match="whole pages"):
        GuestRam("odd", length)


def test_a_forked_child_has_no_mapping(ram: GuestRam) -> None:
    """Its writes would pass behind every protection."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ram.write(0, b"seen?")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11
    assert ram.read(0, 5) == bytes(5)


def test_closed_is_closed(ram: GuestRam) -> None:
    ram.close()
    ram.close()
    with pytest.raises(UsageError, match="closed"):
        ram.read(0, 1)


def test_more_than_the_address_space_is_an_error_of_the_host() -> None:
    with pytest.raises(HostError, match="no room"):
        GuestRam("huge", 1 << 50)


CLOSING = """
import threading
from stillframe.errors import UsageError
from stillframe.board.memory.guest_ram import GuestRam

def read(ram, began):
    try:
        while True:
            began.set()
            ram.read(0, ram.length_bytes)
    except UsageError:
        pass

for _ in range(10):
    ram, began = GuestRam("board.ram", 64 << 20), threading.Event()
    threads = [threading.Thread(target=read, args=(ram, began)) for _ in range(2)]
    for thread in threads:
        thread.start()
    began.wait()
    ram.close()
    for thread in threads:
        thread.join()
"""


def test_closing_waits_for_who_copies() -> None:
    """In a process of its own: it would die of SIGSEGV."""
    done = subprocess.run([sys.executable, "-c", CLOSING], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr
