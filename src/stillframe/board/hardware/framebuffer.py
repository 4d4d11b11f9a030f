"""The framebuffer: RAM block ``board.vram``, XRGB8888, rows packed. Only its geometry is device
state; the picture is RAM.

Source: netpbm ppm(5).
"""

from __future__ import annotations

import msgspec

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.fields import StateDescription, u32
from stillframe.still.png import png

_PIXEL_BYTES = 4


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture: ``xrgb`` has four bytes per pixel (blue, green, red, unused), rows packed."""

    width: int
    height: int
    xrgb: bytes

    def rgb(self) -> bytes:
        """Return three bytes per pixel: red, green, blue."""
        pixels = bytearray(3 * self.width * self.height)
        pixels[0::3] = self.xrgb[2::4]
        pixels[1::3] = self.xrgb[1::4]
        pixels[2::3] = self.xrgb[0::4]
        return bytes(pixels)

    def ppm(self) -> bytes:
        """Return the picture as a raw PPM file."""
        return f"P6\n{self.width} {self.height}\n255\n".encode() + self.rgb()

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return png(self.width, self.height, self.rgb())


class Framebuffer:
    """The framebuffer. ``width``, ``height``: pixels, fixed for the board's life."""

    def __init__(self, ram: GuestRam, width: int, height: int) -> None:
        self._ram = ram
        self._geometry = (width, height)
        self.width = width
        self.height = height

    def picture(self) -> Picture:
        """Return the picture as it is now; torn where the guest draws. Without the board lock."""
        return Picture(
            width=self.width,
            height=self.height,
            xrgb=self._ram.read(0, self.width * self.height * _PIXEL_BYTES),
        )

    def check(self) -> None:
        """Restore the board's geometry; raise ValueError if a loaded one differed."""
        loaded = (self.width, self.height)
        self.width, self.height = self._geometry
        if loaded != self._geometry:
            raise ValueError(
                f"it has {loaded[0]}x{loaded[1]} pixels, this board {self.width}x{self.height}"
            )


def _loaded(framebuffer: Framebuffer, version_id: int) -> None:
    framebuffer.check()


FRAMEBUFFER = StateDescription(
    name="framebuffer",
    version_id=1,
    minimum_version_id=1,
    fields=(u32("width"), u32("height")),
    post_load=_loaded,
)
