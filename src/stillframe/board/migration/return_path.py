"""The return path: messages from the destination to the source during a load.

Each message is a 16-bit type, a 16-bit length, and that many bytes, all big-endian.
Source: QEMU ``migration/migration.c`` (``enum mig_rp_message_type``, ``rp_cmd_args``,
``source_return_path_thread``, ``migrate_send_rp_message``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import TypeAlias

import msgspec

from stillframe.errors import DataError
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import NAME_LIMIT_BYTES

_HEADER = Struct(">HH")
_U32 = Struct(">I")
_PAGES = Struct(">QI")
_MOST_BYTES = 512
"""QEMU's own limit for one message."""


class MessageType(IntEnum):
    """Message types; any other number is refused."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


_LENGTHS = {
    MessageType.SHUT: 4,
    MessageType.PONG: 4,
    MessageType.REQ_PAGES: 12,
    MessageType.RESUME_ACK: 4,
    MessageType.SWITCHOVER_ACK: 0,
}


class Shut(msgspec.Struct, frozen=True):
    """The destination's last message; ``error`` is 0 after a successful load."""

    error: int


class Pong(msgspec.Struct, frozen=True):
    """The answer to the PING with this number."""

    number: int


class PageRequest(msgspec.Struct, frozen=True):
    """Pages the destination's guest waits for; ``idstr`` None means the last request's block."""

    idstr: str | None
    offset_bytes: int
    length_bytes: int


Message: TypeAlias = Shut | Pong | PageRequest


def read_message(source: StreamSource) -> Message:
    """Read the next message.

    Raises:
        DataError: the message is truncated (the destination hung up), malformed, or belongs to an
            unsupported feature (recovery of a paused postcopy, switchover-ack).
    """
    kind, length = _HEADER.unpack(source.take(_HEADER.size, "the return path"))
    try:
        message = MessageType(kind)
    except ValueError:
        raise DataError(f"Received invalid message {kind:#06x} length {length:#06x}") from None
    expected = _LENGTHS.get(message)
    if (expected is not None and length != expected) or length > _MOST_BYTES:
        raise DataError(
            f"Received '{message.name}' message ({kind:#06x}) with incorrect length {length}"
        )
    data = source.take(length, "the return path")
    match message:
        case MessageType.SHUT:
            return Shut(_U32.unpack(data)[0])
        case MessageType.PONG:
            return Pong(_U32.unpack(data)[0])
        case MessageType.REQ_PAGES:
            return PageRequest(None, *_PAGES.unpack(data))
        case MessageType.REQ_PAGES_ID:
            return _request_with_name(data)
        case _:
            raise DataError(f"Received '{message.name}' message, which nothing here asked for")


def _request_with_name(data: bytes) -> PageRequest:
    name_at = _PAGES.size + 1
    if len(data) < name_at or len(data) != name_at + data[_PAGES.size]:
        raise DataError(f"Req_Page_id with length {len(data)}")
    offset_bytes, length_bytes = _PAGES.unpack(data[: _PAGES.size])
    try:
        idstr = data[name_at:].decode("ascii")
    except UnicodeDecodeError:
        raise DataError("Req_Page_id with a malformed name") from None
    return PageRequest(idstr, offset_bytes, length_bytes)


class ReturnPathWriter:
    """The destination's end. Safe to use from several threads: each message is sent whole.

    Args:
        write: writes all of the bytes, or raises.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._last_idstr: str | None = None

    def shut(self, error: int) -> None:
        """Send the last message; a nonzero ``error`` means that the load failed."""
        self._send(MessageType.SHUT, _U32.pack(error))

    def pong(self, number: int) -> None:
        """Answer a PING."""
        self._send(MessageType.PONG, _U32.pack(number))

    def request_pages(self, idstr: str, offset_bytes: int, length_bytes: int) -> None:
        """Request pages, naming the block only if it differs from the last request's.

        Args:
            idstr: the block's name, at most 255 ASCII characters.

        Raises:
            DataError: the name is too long.
        """
        pages = _PAGES.pack(offset_bytes, length_bytes)
        with self._lock:
            if idstr == self._last_idstr:
                self._send_locked(MessageType.REQ_PAGES, pages)
                return
            name = idstr.encode("ascii")
            if len(name) > NAME_LIMIT_BYTES:
                raise DataError(f"the name of RAM block '{idstr}' is too long")
            self._send_locked(MessageType.REQ_PAGES_ID, pages + bytes((len(name),)) + name)
            self._last_idstr = idstr

    def _send(self, kind: MessageType, data: bytes) -> None:
        with self._lock:
            self._send_locked(kind, data)

    def _send_locked(self, kind: MessageType, data: bytes) -> None:
        self._write(_HEADER.pack(kind, len(data)) + data)
