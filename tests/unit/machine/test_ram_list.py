"""The walk over ``ram_list``, in a list that the test builds in its own memory."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

import pytest

from stillframe.machine.qemu import ram_list
from stillframe.machine.qemu.ram_list import RamList, RamListError

HEAD = 56
Build = Callable[..., RamList]


class FakeList:
    """A ram_list head and its blocks, laid out as QEMU does."""

    def __init__(self, head_offset: int, blocks: list[tuple[bytes, int, int, int]]) -> None:
        self.head = ctypes.create_string_buffer(128)
        self.blocks = [ctypes.create_string_buffer(512) for _ in blocks]
        for buffer, (name, host, used, maximum) in zip(self.blocks, blocks, strict=True):
            struct.pack_into("<Q", buffer, 24, host)
            struct.pack_into("<QQQ", buffer, 40, 0x1000, used, maximum)
            struct.pack_into("<I", buffer, 72, 16)
            buffer[76 : 76 + len(name)] = name  # type: ignore[index]
        for buffer, following in zip(self.blocks, self.blocks[1:], strict=False):
            struct.pack_into("<Q", buffer, 336, ctypes.addressof(following))
        if self.blocks:
            struct.pack_into("<Q", self.head, head_offset, ctypes.addressof(self.blocks[0]))


def open_list(monkeypatch: pytest.MonkeyPatch, fake: FakeList) -> RamList:
    address = ctypes.addressof(fake.head)
    monkeypatch.setattr(ram_list, "symbol_address", lambda _pid, _name: address)
    return RamList(os.getpid())


GOOD = [(b"pc.ram", 0x7F0000000000, 1 << 30, 1 << 30), (b"/rom@x", 0x7F1000000000, 4096, 65536)]


@pytest.mark.parametrize("head_offset", ram_list.HEAD_OFFSETS)
def test_a_good_list(monkeypatch: pytest.MonkeyPatch, head_offset: int) -> None:
    fake = FakeList(head_offset, GOOD)
    blocks = open_list(monkeypatch, fake).walk(head_offset)
    assert [(b.idstr, b.hva, b.used_length_bytes, b.max_length_bytes) for b in blocks] == [
        ("pc.ram", 0x7F0000000000, 1 << 30, 1 << 30),
        ("/rom@x", 0x7F1000000000, 4096, 65536),
    ]
    assert blocks[0].flags == ram_list.RAM_MIGRATABLE


BAD = {
    "empty": [],
    "used more than there is": [(b"a", 1, 2, 1)],
    "nothing used": [(b"a", 1, 0, 1)],
    "absurdly long": [(b"a", 1, 1, 1 << 60)],
    "nowhere": [(b"a", 0, 1, 1)],
    "a name without end": [(b"a" * 256, 1, 1, 1)],
    "a name that is no text": [(b"\xff\xfe", 1, 1, 1)],
    "a name with control characters": [(b"a\nb", 1, 1, 1)],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_makes_no_sense(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fake = FakeList(HEAD, BAD[kind])
    with pytest.raises(RamListError):
        open_list(monkeypatch, fake).walk(HEAD)


def test_a_list_in_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeList(HEAD, GOOD)
    struct.pack_into("<Q", fake.blocks[1], 336, ctypes.addressof(fake.blocks[0]))
    with pytest.raises(RamListError, match="does not end"):
        open_list(monkeypatch, fake).walk(HEAD)


@pytest.mark.parametrize("pointer", [1, 0xFFFF_FFFF_FFFF_FFF0, 1 << 47])
def test_a_stale_pointer(monkeypatch: pytest.MonkeyPatch, pointer: int) -> None:
    fake = FakeList(HEAD, GOOD)
    struct.pack_into("<Q", fake.blocks[0], 336, pointer)
    with pytest.raises(RamListError, match=r"not readable|not wholly"):
        open_list(monkeypatch, fake).walk(HEAD)


def test_a_program_without_the_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_list, "symbol_address", lambda _pid, _name: None)
    with pytest.raises(RamListError, match="does not export"):
        RamList(os.getpid())
