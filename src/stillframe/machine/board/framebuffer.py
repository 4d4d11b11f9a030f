"""The framebuffer: RAM block ``board.vram``, XRGB8888, rows packed. Only its geometry is a
device's state; the picture is RAM."""

from __future__ import annotations

from stillframe.machine.board.screenshot import Picture
from stillframe.memory.guest_ram import GuestRam
from stillframe.vmstate.fields import StateDescription, u32

_PIXEL_BYTES = 4


class Framebuffer:
    """``width``, ``height``: pixels, the board's for its life."""

    def __init__(self, ram: GuestRam, width: int, height: int) -> None:
        self._ram = ram
        self._geometry = (width, height)
        self.width = width
        self.height = height

    def picture(self) -> Picture:
        """The picture as it is now, torn where the guest is drawing. Without the board lock."""
        return Picture(
            width=self.width,
            height=self.height,
            xrgb=self._ram.read(0, self.width * self.height * _PIXEL_BYTES),
        )

    def check(self) -> None:
        """Raises ValueError if a loaded geometry is not the board's, and restores it."""
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
