"""A splitter of a server's byte stream into QMP messages (QEMU ``docs/interop/qmp-spec.rst``).

A server ends each message with CR LF. A plain monitor sends each message as one line; a
``-qmp-pretty`` one sends many lines, of which only the last begins with the closing brace.
"""

from __future__ import annotations

import msgspec

_MESSAGE_MAX_BYTES = 64 << 20
_decode = msgspec.json.Decoder(dict[str, object]).decode


class FramingError(Exception):
    """The input is no QMP message."""


class Framer:
    """An incremental parser of messages."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._lines: list[bytes] = []
        self._held_bytes = 0

    def feed(self, data: bytes) -> list[dict[str, object]]:
        """Return the messages that ``data`` completes, in order.

        Raises:
            FramingError: the input is no message, or an absurdly long one.
        """
        messages: list[dict[str, object]] = []
        *ends, last = data.split(b"\n")
        for end in ends:
            message = self._line(b"".join((*self._rest, end)).rstrip(b"\r"))
            self._rest, self._rest_bytes = [], 0
            if message is not None:
                messages.append(message)
        self._rest.append(last)
        self._rest_bytes += len(last)
        if self._rest_bytes + self._held_bytes > _MESSAGE_MAX_BYTES:
            raise FramingError(f"a message of more than {_MESSAGE_MAX_BYTES} bytes")
        return messages

    def _line(self, line: bytes) -> dict[str, object] | None:
        """Return the message that this line completes, if any."""
        if not self._lines:
            if not line.strip():
                return None
            if not line.startswith(b"{"):
                raise FramingError(_excerpt(line))
            if line.endswith(b"}"):
                return _message(line)
        self._lines.append(line)
        self._held_bytes += len(line)
        if line != b"}":
            return None
        whole = b"\n".join(self._lines)
        self._lines, self._held_bytes = [], 0
        return _message(whole)


def _message(text: bytes) -> dict[str, object]:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FramingError(_excerpt(text)) from error


def _excerpt(text: bytes) -> str:
    return repr(text[:60])[1:]
