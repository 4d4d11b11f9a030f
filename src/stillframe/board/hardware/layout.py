"""The board's guest-physical addresses, bytes (docs/design/board.md, "Address space")."""

from __future__ import annotations

PAGE_BYTES = 4096
SECTOR_BYTES = 512

RAM_IDSTR, VRAM_IDSTR, DIMM_IDSTR = "board.ram", "board.vram", "board.dimm0"
"""Names of the RAM blocks."""

RAM_GPA = 0x0
RAM_LIMIT_BYTES = 3 << 30
"""``board.ram`` ends below the framebuffer."""

GDT_GPA = 0x1000
INFO_GPA = 0x2000
COMMAND_LINE_GPA = 0x2100
COMMAND_LINE_LIMIT_BYTES = 1024
"""Includes the NUL at its end."""

GUEST_GPA = 0x100000
"""The lowest address that a guest's segments may have."""

VRAM_GPA = 0xE0000000
VRAM_LIMIT_BYTES = 0x20000000
DISPLAY_LIMIT_PIXELS = 4096
"""Each side of the picture."""

DIMM_GPA = 0x100000000
DIMM_LIMIT_BYTES = 1 << 36

STACK_BYTES = 64 << 10
VCPUS_LIMIT = 8

CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10
