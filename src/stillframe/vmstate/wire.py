"""The constants of QEMU's migration stream, version 3.

Sources: QEMU ``migration/savevm.h``, ``migration/ram.c``, ``migration/multifd.h``,
``migration/savevm.c`` (``enum qemu_vm_cmd``). All integers in the stream are big-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

STREAM_MAGIC = 0x5145564D
"""``QEVM``."""
STREAM_START = STREAM_MAGIC.to_bytes(4, "big")
STREAM_VERSION = 3

MULTIFD_MAGIC = 0x11223344
"""First word of every packet on a multifd channel, which carries only pages."""

NAME_LIMIT_BYTES = 255
"""Names of sections and RAM blocks have a one-byte length."""

RAM_IDSTR = "ram"
RAM_INSTANCE_ID = 0
RAM_VERSION = 4

XBZRLE_ENCODING = 0x01
"""The only encoding byte that an XBZRLE record may carry."""


class SectionType(IntEnum):
    """First byte of each item on the top level of the stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RamFlag(IntFlag):
    """Low bits of a RAM record's first word; the rest is the offset in the block."""

    FULL = 0x001
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


class CommandCode(IntEnum):
    """Codes of COMMAND records."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11
