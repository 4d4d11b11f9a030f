"""Programs on a terminal of their own, as a person starts them, and what is to be seen on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence

CTRL_C = b"\x03"
COLUMNS = 200
AGAIN_S, END_S = 0.02, 60.0
_PIECE = re.compile(r"\x1b\[\??[\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|.", re.DOTALL)


def _keep_what_was_written(terminal: int) -> None:
    """Ctrl-C on a terminal discards what was written to it and not read yet (termios: NOFLSH)."""
    attributes = termios.tcgetattr(terminal)
    attributes[3] |= termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


class Terminal:
    """A program whose standard streams are a terminal, which is its controlling one: what is typed
    there signals it, and only what is in its session."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, COLUMNS, 0, 0))
        _keep_what_was_written(theirs)
        colourful = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
        self._process = subprocess.Popen(
            list(words), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=colourful | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)} | dict(environment),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while select.select([self._ours], [], [])[0]:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # EIO: the program has ended
                return
            if not part:
                return
            self.seen += part

    @property
    def pid(self) -> int:
        return self._process.pid

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait(self, *, again: bytes = b"") -> int:
        """Its exit code, once it has ended.

        Args:
            again: typed again and again meanwhile.
        """
        try:
            while again and self._process.poll() is None:
                self.type(again)
                time.sleep(AGAIN_S)
            code = self._process.wait(END_S)
            self._reader.join(END_S)
            assert not self._reader.is_alive(), "somebody else has the terminal open"
        finally:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)
        return code

    def screen(self) -> list[str]:
        """The lines that are left on it, without colours and what the terminal echoes."""
        return screen(self.seen.replace(b"^C", b""))


def screen(content: bytes) -> list[str]:
    """What a terminal shows in the end.

    Raises:
        AssertionError: a sequence that is none of the few that are known here, or a hidden cursor.
    """
    lines, row, column, is_shown = [""], 0, 0, True
    for piece in _PIECE.findall(content.decode()):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\x1b[1A":
            row = max(0, row - 1)
        elif piece in ("\x1b[?25l", "\x1b[?25h"):
            is_shown = piece.endswith("h")
        elif piece.startswith("\x1b"):
            assert re.fullmatch(r"\x1b\[[\d;]*m", piece), piece
        else:
            before = lines[row][:column].ljust(column)
            lines[row] = before + piece + lines[row][column + len(piece) :]
            column += len(piece)
            assert column <= COLUMNS, f"wrapped: {piece}"
    assert is_shown, "the cursor is hidden"
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]
