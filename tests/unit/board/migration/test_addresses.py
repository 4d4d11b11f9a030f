"""Migration URIs, as QEMU writes them."""

from __future__ import annotations

import pytest

from stillframe.board.migration.addresses import (
    FdAddress,
    FdsetAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    parse_uri,
)
from stillframe.errors import UsageError


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:10.0.0.1:4444", TcpAddress("10.0.0.1", 4444)),
        ("tcp::4444", TcpAddress("", 4444)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp:host:1,ipv4=on", TcpAddress("host", 1)),
        ("unix:/run/a,b.sock", UnixAddress("/run/a,b.sock")),
        ("fd:mig", FdAddress("mig")),
        ("file:/dev/fdset/7", FdsetAddress(7, 0)),
        ("file:/dev/fdset/7,offset=4096", FdsetAddress(7, 4096)),
        ("file:a:b", FileAddress("a:b", 0)),
        ("file:/x,offset=16", FileAddress("/x", 16)),
    ],
)
def test_understood(uri: str, address: object) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("bla:x", "unknown migration protocol: bla:x"),
        ("", "unknown migration protocol: "),
        ("tcp", "unknown migration protocol: tcp"),
        ("exec:cat", "unknown migration protocol: exec:cat"),
        ("tcp:127.0.0.1", "error parsing address '127.0.0.1'"),
        ("tcp:", "error parsing address ''"),
        ("tcp:::1:5", "error parsing address '::1:5'"),
        ("tcp:h:65536", "port 65536"),
        ("tcp:h:٣", "error parsing address"),
        ("unix:", "invalid Unix socket address"),
        ("unix:a\0b", "invalid Unix socket address"),
        ("fd:", "invalid file descriptor address"),
        ("file:", "invalid file name ''"),
        ("file:/x,offset=-1", "file URI has bad offset -1"),
        ("file:/dev/fdset/x", "Invalid fdset 'x'"),
        (f"file:/dev/fdset/1,offset={1 << 63}", "file URI has bad offset"),
        ("file:/dev/fdset/1,offset=" + "9" * 5000, "file URI has bad offset"),
    ],
)
def test_refused(uri: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_uri(uri)
    assert text in str(caught.value)
