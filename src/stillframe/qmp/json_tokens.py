"""Values out of a QMP client's byte stream, however it is cut, malformed or hostile.

A server cannot go by lines as a client can (``framing``): a client may send half a command now and
the rest later, several in one packet, and garbage. As in QEMU, bytes are cut into JSON tokens, a
value is whole when its brackets are, and after a byte that fits nowhere everything is skipped up
to the next control character, bracket, comma or colon. The byte 0xff, which no JSON contains, thus
ends whatever was half said (QEMU ``qobject/json-lexer.c``, ``json-streamer.c``;
``docs/interop/qmp-spec.rst``, section 2.6).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from stillframe.qmp.errors import QmpError
from stillframe.qmp.json_values import value_of

MESSAGE_MAX_BYTES = 64 << 20
MESSAGE_MAX_TOKENS = 2 << 20
NESTING_MAX = 1 << 10
"""QEMU's limits."""
_WORD_MAX_BYTES = 4096
"""A longer number or keyword is refused: it is looked through anew with each packet of it."""
_SHOWN_BYTES = 100

_BLANKS = re.compile(rb"[ \t\r\n]*+")
_STRING_REST = {
    quote: re.compile(rb"(?:[^\x00-\x1f\\\xfe\xff%c]++|\\[^\x00-\x1f\xfe\xff])*+" % quote)
    for quote in b"\"'"
}
_KEYWORD = re.compile(rb"[a-z]++")
# As much as can become a number, and what is one; as in QEMU, 0e1 is none.
_NUMBER_BEGUN = re.compile(
    rb"-?(?:0(?:\.(?:[0-9]++(?:[eE][+-]?[0-9]*+)?)?)?"
    rb"|[1-9][0-9]*+(?:\.(?:[0-9]++(?:[eE][+-]?[0-9]*+)?)?|[eE][+-]?[0-9]*+)?)?"
)
_NUMBER = re.compile(
    rb"-?(?:0(?:\.[0-9]++(?:[eE][+-]?[0-9]++)?)?|[1-9][0-9]*+(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)"
)
_RECOVERY = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")

_PUNCTUATION = frozenset(b"{}[]:,")
_DIGITS = frozenset(b"0123456789")
_NUMBER_STARTS = _DIGITS | frozenset(b"-")
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz")
_QUOTES = frozenset(b"\"'")
_BACKSLASH = ord("\\")


class JsonStream:
    """Takes bytes as they come; gives whole values and errors, in order."""

    def __init__(self) -> None:
        self._skipping = False
        self._carried = b""  # a number, keyword or escape that may go on in the next packet
        self._string: list[bytes] = []  # the parts of a string that is not whole yet
        self._tokens: list[bytes] = []
        self._message_bytes = 0
        self._braces = 0
        self._squares = 0

    def feed(self, data: bytes) -> Iterator[object]:
        """What is whole now: JSON values, and a ``QmpError`` for what is none.

        Use the iterator up before the next call. It never raises.
        """
        data, self._carried = self._carried + data, b""
        at, end = 0, len(data)
        while at < end:
            if self._skipping:
                found = _RECOVERY.search(data, at)
                if found is None:
                    return
                at, self._skipping = found.start(), False
            token, error, at = (
                self._string_on(data, at) if self._string else self._next_token(data, at)
            )
            if token:
                yield from self._take(token)
            elif error is not None:
                self._forget_message()
                yield error

    def _next_token(self, data: bytes, at: int) -> tuple[bytes, QmpError | None, int]:
        """A token or an error, if there is one now, and where to go on."""
        at, end = _end_of(_BLANKS, data, at), len(data)
        if at == end:
            return b"", None, end
        byte = data[at]
        if byte in _PUNCTUATION:
            return data[at : at + 1], None, at + 1
        if byte in _QUOTES:
            self._string = [data[at : at + 1]]
            self._message_bytes += 1
            return b"", None, at + 1
        if byte in _LETTERS:
            stop = _end_of(_KEYWORD, data, at)
        elif byte in _NUMBER_STARTS:
            stop = _end_of(_NUMBER_BEGUN, data, at)
        else:
            return self._stray(data[at : at + 1], at + 1)
        word = data[at:stop]
        if len(word) > _WORD_MAX_BYTES:
            return self._too_long(stop)
        if stop == end:
            self._carried = word
            return b"", None, end
        if byte not in _LETTERS and not _is_number(word, data[stop]):
            return self._stray(data[at : stop + 1], stop + 1)
        return word, None, stop

    def _string_on(self, data: bytes, at: int) -> tuple[bytes, QmpError | None, int]:
        """Go on with a string, as ``_next_token``."""
        quote = self._string[0]
        stop, end = _end_of(_STRING_REST[quote[0]], data, at), len(data)
        # The quotation mark and what else is not in the message's count yet.
        self._string.append(data[at : stop + 1])
        if stop == end - 1 and data[stop] == _BACKSLASH:
            self._string[-1] = data[at:stop]
            self._carried, stop = data[stop:], end
        self._message_bytes += len(self._string[-1])
        if self._message_bytes > MESSAGE_MAX_BYTES:
            self._string = []
            return self._too_long(stop)
        if stop == end:
            return b"", None, end
        text, self._string = b"".join(self._string), []
        if data[stop] == quote[0]:
            self._message_bytes -= len(text)  # _take counts it
            return text, None, stop + 1
        if data[stop] == _BACKSLASH:  # then it is the byte after it that does not fit
            return self._stray(text + data[stop + 1 : stop + 2], stop + 2)
        return self._stray(text, stop + 1)

    def _stray(self, text: bytes, stop: int) -> tuple[bytes, QmpError, int]:
        self._skipping = True
        shown = text[:_SHOWN_BYTES].decode(errors="replace")
        return b"", QmpError(f"JSON parse error, stray '{shown}'"), stop

    def _too_long(self, stop: int) -> tuple[bytes, QmpError, int]:
        self._skipping = True
        return b"", QmpError("JSON token size limit exceeded"), stop

    def _take(self, token: bytes) -> Iterator[object]:
        """One more token: the value or error that it completes, if it does."""
        if token == b"{":
            self._braces += 1
        elif token == b"}":
            self._braces -= 1
        elif token == b"[":
            self._squares += 1
        elif token == b"]":
            self._squares -= 1
        self._tokens.append(token)
        self._message_bytes += len(token)
        limit = ""
        if self._message_bytes > MESSAGE_MAX_BYTES:
            limit = "size"
        elif len(self._tokens) > MESSAGE_MAX_TOKENS:
            limit = "count"
        if limit:
            self._forget_message()
            yield QmpError(f"JSON token {limit} limit exceeded")
        elif self._braces + self._squares > NESTING_MAX:
            self._forget_message()
            yield QmpError("JSON nesting depth limit exceeded")
        elif self._braces < 0 or self._squares < 0 or self._braces == self._squares == 0:
            tokens = self._tokens
            self._forget_message()
            try:
                yield value_of(tokens)
            except QmpError as error:
                yield error

    def _forget_message(self) -> None:
        self._tokens = []
        self._message_bytes = self._braces = self._squares = 0


def _end_of(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    match = pattern.match(data, at)
    return match.end() if match else at


def _is_number(word: bytes, following: int) -> bool:
    """Whether a number is whole, given the byte after it."""
    if word in (b"0", b"-0") and following in _DIGITS:
        return False
    return _NUMBER.fullmatch(word) is not None
