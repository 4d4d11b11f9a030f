"""The stream header, and the magic of other file types.

Source: QEMU ``migration/savevm.c``, ``qemu_loadvm_state_header``.
"""

from __future__ import annotations

from stillframe.errors import DataError
from stillframe.vmstate.records import Header
from stillframe.vmstate.source import StreamSource
from stillframe.vmstate.wire import MULTIFD_MAGIC, STREAM_MAGIC, STREAM_VERSION

_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_REMEDY = "a .still file is a snapshot already ('stillframe show'); else decompress it first"
_OTHER_MAGICS = {
    _ZSTD: "zstd-compressed data",
    b"\x1f\x8b": "gzip-compressed data",
    b"\xfd7zX": "xz-compressed data",
    b"BZh": "bzip2-compressed data",
    b"QFI\xfb": "a qcow2 disk image",
    b"\x7fELF": "an ELF file",
    b"\x16\x03": "a TLS connection",
    MULTIFD_MAGIC.to_bytes(4, "big"): "a multifd channel, which carries pages only",
}


def read_stream_header(source: StreamSource) -> Header:
    """Read magic and version.

    Raises:
        DataError: the data is something else (named, if known) or another version.
    """
    source.prefetch(8)
    begin = source.buffer[:4]
    for magic, name in _OTHER_MAGICS.items():
        if begin.startswith(magic):
            raise DataError(
                f"this is {name}, not a migration stream",
                remedy=_ZSTD_REMEDY if magic == _ZSTD else None,
                offset_bytes=0,
            )
    magic_word = source.u32("the stream's header")
    if magic_word != STREAM_MAGIC:
        raise DataError(
            "this is not a migration stream",
            why=f"it starts with 0x{magic_word:08x}",
            offset_bytes=0,
        )
    version = source.u32("the stream's header")
    if version != STREAM_VERSION:
        raise DataError(
            f"the stream has version {version}, only version 3 is known", offset_bytes=4
        )
    return Header(version=version)
