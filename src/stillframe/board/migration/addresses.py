"""Migration URIs: ``tcp:``, ``unix:``, ``fd:`` and ``file:``.

Syntax and wording are QEMU's (``migration/migration.c``: ``migrate_uri_parse``;
``util/qemu-sockets.c``).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stillframe.errors import UsageError

_FDSET = "/dev/fdset/"
_OFFSET_LIMIT = 1 << 63
_DIGITS = len(str(_OFFSET_LIMIT))
"""Python refuses to parse much longer numbers."""


class TcpAddress(msgspec.Struct, frozen=True):
    """A TCP address; an empty ``host`` listens on all addresses, or connects to localhost."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(msgspec.Struct, frozen=True):
    """A unix socket's path."""

    path: str

    def __str__(self) -> str:
        return self.path


class FdAddress(msgspec.Struct, frozen=True):
    """A descriptor that a client handed over with ``getfd`` under this name.

    On a command line, ``name`` is the number of an inherited descriptor.
    """

    name: str


class FdsetAddress(msgspec.Struct, frozen=True):
    """A descriptor that a client handed over with ``add-fd``: ``file:/dev/fdset/N``."""

    fdset_id: int
    offset_bytes: int


class FileAddress(msgspec.Struct, frozen=True):
    """A file, from ``offset_bytes`` on."""

    path: str
    offset_bytes: int


Address: TypeAlias = TcpAddress | UnixAddress | FdAddress | FdsetAddress | FileAddress


def parse_uri(uri: str) -> Address:
    """Parse a migration URI.

    Raises:
        UsageError: the URI is of another kind, or malformed.
    """
    kind, colon, rest = uri.partition(":")
    match kind if colon else "":
        case "tcp":
            return _tcp(rest)
        case "unix":
            if not rest or "\0" in rest:
                raise UsageError("invalid Unix socket address")
            return UnixAddress(rest)
        case "fd":
            if not rest:
                raise UsageError("invalid file descriptor address")
            return FdAddress(rest)
        case "file":
            return _file(rest)
    raise UsageError(f"unknown migration protocol: {uri}")


def _tcp(text: str) -> TcpAddress:
    address = text.partition(",")[0]
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise UsageError(f"error parsing address '{text}'")
    if len(port) > _DIGITS or int(port) > 0xFFFF:
        raise UsageError(f"port {port} in address '{text}' is not one")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"error parsing address '{text}'")
    return TcpAddress(host, int(port))


def _file(text: str) -> FileAddress | FdsetAddress:
    path, comma, option = text.rpartition(",offset=")
    offset_bytes = 0
    if comma:
        if not (option.isascii() and option.isdigit()):
            raise UsageError(f"file URI has bad offset {option}")
        offset_bytes = int(option) if len(option) <= _DIGITS else _OFFSET_LIMIT
        if offset_bytes >= _OFFSET_LIMIT:
            raise UsageError(f"file URI has bad offset {option}")
    else:
        path = text
    if not path or "\0" in path:
        raise UsageError(f"invalid file name '{path}'")
    number = path.removeprefix(_FDSET)
    if number != path:
        if not (number.isascii() and number.isdigit()) or len(number) > _DIGITS:
            raise UsageError(f"Invalid fdset '{number}'")
        return FdsetAddress(int(number), offset_bytes)
    return FileAddress(path, offset_bytes)
