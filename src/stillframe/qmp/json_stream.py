"""An incremental JSON parser for a QMP client's untrusted byte stream.

A server cannot go by lines as a client can (``framing``): a client may send half a command now and
the rest later, or several in one packet. A value ends with its last bracket; one without brackets
ends with whitespace. The byte 0xff, which no JSON contains, and a control character in a string end
an unfinished value with an error, as in QEMU (``docs/interop/qmp-spec.rst``, section 2.6).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from stillframe.qmp.errors import QmpError

MESSAGE_MAX_BYTES = 64 << 20
NESTING_MAX = 512
"""QEMU's limit is 1024; Python's decoder gives up earlier."""

_IN_STRING = re.compile(rb'\\[^\x00-\x1f\xff]|["\x00-\x1f\xff]')
_OUTSIDE = re.compile(rb'[{}\[\]"\xff]|(?<![ \t\r\n])[ \t\r\n]')


class JsonStream:
    """An incremental parser; yields values and errors in order."""

    def __init__(self) -> None:
        self._message = bytearray()
        self._scanned = 0
        self._in_string = False
        self._depth = 0
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[object]:
        """Yield the JSON values that ``data`` completes, and a ``QmpError`` for malformed input.

        Exhaust the iterator before the next call. It never raises.
        """
        for part in re.split(rb"(?<=[\n\xff])", data):
            if self._skipping:  # an oversized message: to the end of the line
                self._skipping = not part.endswith((b"\n", b"\xff"))
                continue
            self._message += part
            while (end := self._find_end()) is not None:
                yield from self._take(end)
            if len(self._message) > MESSAGE_MAX_BYTES or self._depth > NESTING_MAX:
                limit = "nesting depth" if self._depth > NESTING_MAX else "token size"
                self._drop(len(self._message))
                self._skipping = not part.endswith((b"\n", b"\xff"))
                yield QmpError(f"JSON {limit} limit exceeded")

    def _find_end(self) -> int | None:
        """Return the end of the value at the start of the buffer, or None if it is incomplete."""
        message = self._message
        while True:
            pattern = _IN_STRING if self._in_string else _OUTSIDE
            match = pattern.search(message, self._scanned)
            if match is None:
                # A trailing backslash escapes the next byte.
                self._scanned = max(self._scanned, len(message) - message.endswith(b"\\"))
                return None
            self._scanned = end = match.end()
            found = message[match.start()]
            if found == 0xFF:
                return end
            if self._in_string:
                if found < 0x20:
                    return end
                self._in_string = found != ord('"')
                if not self._in_string and self._depth == 0:
                    return end
            elif found == ord('"'):
                self._in_string = True
            elif found in b"{[":
                self._depth += 1
                if self._depth > NESTING_MAX:
                    return None
            elif found in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    return end
            elif self._depth == 0 and message[:end].strip():
                return end

    def _take(self, end: int) -> Iterator[object]:
        text = bytes(self._message[:end]).strip()
        self._drop(end)
        try:
            yield msgspec.json.decode(text)
        except (ValueError, RecursionError) as error:
            yield QmpError(f"JSON parse error, {error}")

    def _drop(self, end: int) -> None:
        del self._message[:end]
        self._scanned = self._depth = 0
        self._in_string = False
