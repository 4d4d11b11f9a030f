"""JSON values out of tokens, with QEMU's words for what is wrong (QEMU ``qobject/json-parser.c``).

Beyond RFC 8259 QEMU takes strings in single quotes, and the escape ``\\'``. Nothing here recurses:
a message may be nested deeper than Python may call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from stillframe.qmp.errors import QmpError

_LITERALS: dict[bytes, object] = {b"true": True, b"false": False, b"null": None}
_QUOTES = (b'"', b"'")
_INTEGER_MIN, _INTEGER_MAX = -(1 << 63), (1 << 64) - 1
"""Integers beyond these are floating-point numbers, as in QEMU (``qobject/qnum.c``)."""

_ESCAPE = re.compile(
    r"""\\(?:(?P<plain>["'\\/bfnrt])"""
    r"|u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|u(?P<unit>[0-9a-fA-F]{4})|(?P<broken>u.{0,4})|.?)",
    re.DOTALL,
)
_CONTROLS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

_Container = dict[str, object] | list[object]


def value_of(tokens: Sequence[bytes]) -> object:
    """The value that the tokens of one message are.

    Raises:
        QmpError: they are none.
    """
    open_containers: list[_Container] = []
    keys: list[str | None] = []  # of what is being read, for each open object; None: a key itself
    rest = iter(tokens)
    token = _after(rest)
    while True:
        # Here a value begins with ``token``.
        value: object
        if token in (b"{", b"["):
            container: _Container = {} if token == b"{" else []
            token = _after(rest)
            if token != (b"}" if isinstance(container, dict) else b"]"):
                open_containers.append(container)
                if isinstance(container, dict):
                    token = _key(container, keys, token, rest)
                continue
            value = container
        else:
            value = _scalar(token)
        # Here one has ended, and with it perhaps what it is in.
        while open_containers:
            container = open_containers[-1]
            if isinstance(container, dict):
                key = keys.pop()
                if key is None:
                    raise _parse_error("key is not a string in object")
                container[key] = value
                token = _after(rest)
                if token == b",":
                    token = _key(container, keys, _after(rest), rest)
                    break
                if token != b"}":
                    raise _parse_error("expected separator in dict")
            else:
                container.append(value)
                token = _after(rest)
                if token == b",":
                    token = _after(rest)
                    break
                if token != b"]":
                    raise _parse_error("expected separator in list")
            value = open_containers.pop()
        else:
            return value


def _key(
    container: dict[str, object], keys: list[str | None], token: bytes, rest: Iterator[bytes]
) -> bytes:
    """Read the key that ``token`` is, and its colon; returns the value's first token."""
    if token in (b"{", b"["):
        # QEMU reads it to its end first, and may find something else that is wrong.
        keys.append(None)
        return token
    key = _scalar(token)
    if not isinstance(key, str):
        raise _parse_error("key is not a string in object")
    if _after(rest) != b":":
        raise _parse_error("missing : in object pair")
    if key in container:
        raise _parse_error("duplicate key")
    keys.append(key)
    return _after(rest)


def _after(rest: Iterator[bytes]) -> bytes:
    token = next(rest, None)
    if token is None:
        raise _parse_error("premature EOI")
    return token


def _scalar(token: bytes) -> object:
    if token[:1] in _QUOTES:
        return _text(token)
    if token[:1].isalpha():
        if token not in _LITERALS:
            raise _parse_error(f"invalid keyword '{token.decode()}'")
        return _LITERALS[token]
    if token[:1].isdigit() or token[:1] == b"-":
        return _number(token)
    raise _parse_error("expecting value")


def _number(token: bytes) -> int | float:
    if token.lstrip(b"-").isdigit():
        number = int(token)
        if _INTEGER_MIN <= number <= _INTEGER_MAX:
            return number
    return float(token)


def _text(token: bytes) -> str:
    try:
        text = token[1:].decode()
    except UnicodeDecodeError as error:
        _ESCAPE.sub(_unescaped, token[1 : 1 + error.start].decode())  # which is wrong first
        raise _parse_error("invalid UTF-8 sequence in string") from None
    # With the closing quotation mark, which QEMU shows as a part of an escape that is too short.
    return (_ESCAPE.sub(_unescaped, text) if "\\" in text else text)[:-1]


def _unescaped(escape: re.Match[str]) -> str:
    plain, high, low, unit = escape.group("plain", "high", "low", "unit")
    if plain:
        return _CONTROLS.get(plain, plain)
    if high:
        code = 0x10000 + ((int(high, 16) & 0x3FF) << 10 | int(low, 16) & 0x3FF)
    elif unit:
        code = int(unit, 16)
    elif escape["broken"]:
        code = -1
    else:
        raise _parse_error("invalid escape sequence in string")
    if code < 0 or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        raise _parse_error(f"{escape[0]} is not a valid Unicode character")
    return chr(code)


def _parse_error(what: str) -> QmpError:
    return QmpError(f"JSON parse error, {what}")
