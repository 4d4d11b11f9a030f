"""The return path's wire format (QEMU ``migration/migration.c``: rp_cmd_args)."""

from __future__ import annotations

import io

import pytest

from stillframe.board.migration.return_path import (
    PageRequest,
    Pong,
    ReturnPathWriter,
    Shut,
    read_message,
)
from stillframe.errors import DataError
from stillframe.vmstate.source import StreamSource


def source(data: bytes) -> StreamSource:
    return StreamSource(io.BytesIO(data), live=True)


def test_what_is_written_is_qemus() -> None:
    sent = bytearray()
    writer = ReturnPathWriter(sent.extend)
    writer.pong(7)
    writer.request_pages("ram", 0x1000, 0x2000)
    writer.request_pages("ram", 0x5000, 0x1000)
    writer.shut(1)
    assert sent == bytes.fromhex(
        "0002 0004 00000007"
        "0003 0010 0000000000001000 00002000 03 72616d"
        "0004 000c 0000000000005000 00001000"
        "0001 0004 00000001"
    )
    stream = source(bytes(sent))
    assert [read_message(stream) for _ in range(4)] == [
        Pong(7),
        PageRequest("ram", 0x1000, 0x2000),
        PageRequest(None, 0x5000, 0x1000),
        Shut(1),
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("0000 0000", "Received invalid message 0x0000 length 0x0000"),
        ("0008 0000", "Received invalid message 0x0008"),
        ("0001 0003 000000", "Received 'SHUT' message (0x0001) with incorrect length 3"),
        ("0003 0201" + "00" * 513, "Received 'REQ_PAGES_ID' message (0x0003) with incorrect"),
        ("0003 000c 0000000000001000 00002000", "Req_Page_id with length 12"),
        ("0003 000f 0000000000001000 00002000 03 7261", "Req_Page_id with length 15"),
        ("0003 000e 0000000000001000 00002000 01 ff", "Req_Page_id with a malformed name"),
        ("0005 0001 00", "RECV_BITMAP"),
        ("0006 0004 00000001", "RESUME_ACK"),
        ("0001 0004 00", "truncated"),
    ],
)
def test_nonsense_is_refused(data: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_message(source(bytes.fromhex(data)))
    assert text in str(caught.value)
