"""The configuration of a board."""

from __future__ import annotations

import msgspec

from stillframe.board.hardware.layout import (
    COMMAND_LINE_LIMIT_BYTES,
    DISPLAY_LIMIT_PIXELS,
    GUEST_GPA,
    PAGE_BYTES,
    RAM_LIMIT_BYTES,
    STACK_BYTES,
    VCPUS_LIMIT,
)
from stillframe.errors import UsageError


class BoardConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of one board; fixed for its life.

    ``guest_path``: the guest's ELF file; None for a board that only loads an incoming stream.
    ``command_line``: text for the guest. ``disk_path``: a raw file, or None.
    ``serial``: ``stdio``, ``none``, ``unix:PATH`` (listens there), or a file's path (output only).
    ``display_width``, ``display_height``: the framebuffer's, pixels.
    ``argv``: the command line that started it, for ``describe``.

    Raises:
        UsageError: no board can have these parts.
    """

    name: str = "board"
    guest_path: str | None = None
    command_line: str = ""
    ram_bytes: int = 64 << 20
    vcpus: int = 1
    disk_path: str | None = None
    serial: str = "none"
    display_width: int = 640
    display_height: int = 480
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= VCPUS_LIMIT:
            raise UsageError(f"a board has 1 to {VCPUS_LIMIT} vCPUs, not {self.vcpus}")
        least_bytes = GUEST_GPA + PAGE_BYTES + self.vcpus * STACK_BYTES
        if not least_bytes <= self.ram_bytes <= RAM_LIMIT_BYTES:
            raise UsageError(
                f"a board with {self.vcpus} vCPUs has {least_bytes >> 10} KiB to "
                f"{RAM_LIMIT_BYTES >> 30} GiB of RAM, not {self.ram_bytes >> 10} KiB"
            )
        if self.ram_bytes % PAGE_BYTES:
            raise UsageError(f"{self.ram_bytes} bytes of RAM are not whole pages of 4 KiB")
        for pixels in (self.display_width, self.display_height):
            if not 1 <= pixels <= DISPLAY_LIMIT_PIXELS:
                raise UsageError(f"a display cannot be {pixels} pixels wide or high")
        text = self.command_line.encode()
        if b"\0" in text or len(text) >= COMMAND_LINE_LIMIT_BYTES:
            raise UsageError(
                f"the guest's command line must be shorter than {COMMAND_LINE_LIMIT_BYTES} bytes, "
                "and without NUL"
            )

    @property
    def vram_bytes(self) -> int:
        """Length of the framebuffer's RAM block, whole pages."""
        return -(-self.display_width * self.display_height * 4 // PAGE_BYTES) * PAGE_BYTES
