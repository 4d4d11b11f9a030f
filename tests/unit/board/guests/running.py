"""A guest on a board of this process, with a hand on its serial line and its RAM."""

from __future__ import annotations

import queue
import tempfile
from pathlib import Path

from guests.serial import SerialConsole
from stillframe.board.hardware.board import Board
from stillframe.board.hardware.config import BoardConfig

TIMEOUT_S = 30.0


class RunningGuest:
    """Started on entering, and ended on leaving.

    Args:
        elf: the guest.
        options: its command line.
    """

    def __init__(
        self,
        elf: Path,
        options: str = "",
        *,
        ram_mib: int = 16,
        vcpus: int = 1,
        disk: Path | None = None,
        display: tuple[int, int] = (64, 48),
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="stillframe-board-")
        self._socket = Path(self._directory.name) / "serial"
        config = BoardConfig(
            guest_path=str(elf),
            command_line=options,
            ram_bytes=ram_mib << 20,
            vcpus=vcpus,
            disk_path=None if disk is None else str(disk),
            serial=f"unix:{self._socket}",
            display_width=display[0],
            display_height=display[1],
        )
        self.board = Board(config)
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.board.add_listener(lambda event, _data: self._events.put(event))

    def __enter__(self) -> RunningGuest:
        # first the connection: what is printed before it would be lost
        self.console = SerialConsole(self._socket)
        self.board.power_on()
        return self

    def __exit__(self, *_error: object) -> None:
        self.board.quit()
        self.board.wait(TIMEOUT_S)
        self.console.close()
        self._directory.cleanup()

    def wait(self, pattern: str, *, since: int = 0) -> str:
        """The first line after the mark ``since`` in which the regular expression is found."""
        return self.console.wait_line(pattern, timeout_s=TIMEOUT_S, since=since)

    def ask(self, command: str, pattern: str) -> str:
        """Type a line; the first answer in which the regular expression is found."""
        mark = self.console.mark()
        self.console.send(command)
        return self.wait(pattern, since=mark)

    def wait_for_event(self, wanted: str) -> None:
        """Until the board tells this event; earlier ones are forgotten."""
        while self._events.get(timeout=TIMEOUT_S) != wanted:
            pass

    def exit_status(self) -> int | None:
        """After the guest has powered off by itself."""
        assert self.board.wait(TIMEOUT_S), f"still {self.board.run_state}"
        return self.board.exit_status

    def image(self) -> bytes:
        """``board.ram`` at one instant."""
        self.board.stop()
        try:
            return self.read(0, self.board.config.ram_bytes)
        finally:
            self.board.cont()

    def read(self, gpa: int, length_bytes: int) -> bytes:
        """A part of ``board.ram``."""
        return self.board.rams[0].read(gpa, length_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """Overwrite a part of ``board.ram``."""
        self.board.rams[0].write(gpa, data)

    def picture(self) -> bytes:
        """``board.vram``."""
        vram = self.board.rams[1]
        return vram.read(0, vram.length_bytes)
