"""The smallest guests for a board: machine code in an ELF file, made without a compiler."""

from __future__ import annotations

import struct
from pathlib import Path

_ENTRY = 0x100000
_HEADERS_BYTES = 64 + 56

IDLE = b"\xf4\xeb\xfd"
"""``hlt; jmp``: does nothing."""
POWER_OFF = b"\x66\xba\x60\x05\xb8\x0f\x5f\x00\x00\xef" + IDLE
"""``mov $0x560, %dx; mov $0x5f0f, %eax; out %eax, (%dx)``, then idle."""
RESET = b"\x66\xba\x64\x05\xef" + IDLE
"""``mov $0x564, %dx; out %eax, (%dx)``, then idle."""
PANIC = b"\x66\xba\xc0\x05\xef" + IDLE
"""``mov $0x5c0, %dx; out %eax, (%dx)``, then idle."""


def write_guest(path: Path, code: bytes = IDLE) -> str:
    """Write such a guest; returns its path."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, _ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    length = _HEADERS_BYTES + len(code)
    segment = struct.pack(
        "<IIQQQQQQ", 1, 5, _HEADERS_BYTES, _ENTRY, _ENTRY, len(code), len(code), 8
    )
    data = header + segment + code
    assert len(data) == length
    path.write_bytes(data)
    return str(path)
