"""The small objects of a store: JSON below a line with its digest, so that damage is detected."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from stillframe.errors import DataError
from stillframe.still.frames import digest_of
from stillframe.store.backends.objects import Backend

Record = TypeVar("Record")
_DIGITS = 64


def encoded(record: Any) -> bytes:
    """Encode a record: BLAKE3 of the JSON, hexadecimal; a newline; the JSON, with a final
    newline."""
    content = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    return digest_of(content).hex().encode() + b"\n" + content


def read(backend: Backend, key: str, kind: type[Record]) -> Record:
    """Read the record that an object holds.

    Raises:
        NotFoundError: no such object. HostError: not permitted.
        DataError: damaged, or of an unknown format.
    """
    return decoded(backend.read(key), key, kind)


def decoded(raw: bytes, key: str, kind: type[Record]) -> Record:
    """Decode the record in an object's bytes. Raises DataError as :func:`read`."""
    content = raw[_DIGITS + 1 :]
    if raw[: _DIGITS + 1] != digest_of(content).hex().encode() + b"\n":
        raise DataError(f"{key} is damaged", why="its digest is not the one in its first line")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{key} cannot be read", why=str(error), remedy="use a newer Stillframe"
        ) from error
