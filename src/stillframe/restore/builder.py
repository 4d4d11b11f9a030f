"""The builder of QEMU's new command line: it decides on each recorded option in turn."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillframe.model import DiskRecord, MachineRecord
from stillframe.restore.captured_disks import CapturedDisks
from stillframe.restore.ledger import Ledger, is_firmware
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue
from stillframe.restore.places import Places
from stillframe.restore.records import Refusal
from stillframe.restore.show import shown_words

OWN = "give that option yourself after --"
UNKNOWN = "Stillframe does not know what it does"
_FD_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sockfd", "fdset", "fdname", "passfd"})
_SCALAR = re.compile(
    r"on|off|auto|yes|no|y|n|true|false|split|-?\d+(\.\d+)?[bkmgtpe]?|0x[0-9a-f]+", re.IGNORECASE
)
"""Numbers, sizes and switches: they name nothing on the host."""
_SEARCHED = frozenset({"romfile"})
_RUNS_PROGRAM = re.compile(r"(?:^|[-=:\s])(?:exec|cmd|unixexec):|^\s*\||[:'\"]\s*\|")


class Builder(Ledger):
    """The new command line in the making.

    Args:
        recorded: the options that stand; ``replaced``: those that the caller's ``own`` replace.
        unprivileged: QEMU will run without the right to make network interfaces.
        moves_ports: move forwarded ports to free ones.
        captured: the snapshot's disks. drive_names: of ``-drive``s, by ``id(option)``.
    """

    def __init__(
        self,
        record: MachineRecord,
        places: Places,
        recorded: Sequence[Option],
        *,
        replaced: Sequence[Option] = (),
        own: Sequence[Option] = (),
        unprivileged: bool = False,
        moves_ports: bool = False,
        captured: CapturedDisks | None = None,
        drive_names: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(places)
        self.record = record
        self.recorded = tuple(recorded)
        self.replaced = tuple(replaced)
        self.own = tuple(own)
        self.nodes: dict[str, Any] | None = None
        self.unprivileged = unprivileged
        self.moves_ports = moves_ports
        self.captured = captured or CapturedDisks()
        self.drive_names = drive_names or {}
        self.words: list[str] = []
        self._refused: list[Option] = []

    # Decisions. A refused option stays refused.

    def keep(self, option: Option) -> None:
        """Write the option as recorded."""
        if option not in self._refused:
            self.words += option.words

    def drop(self, option: Option, reason: str) -> None:
        """Leave the option out."""
        self.rewrite(option.text, "", reason)

    def replace(self, option: Option, words: Iterable[str], reason: str) -> None:
        """Write ``words`` in its place; nothing is noted if they are the same."""
        if option in self._refused:
            return
        new = tuple(words)
        self.words += new
        if new != option.words:
            self.rewrite(option.text, shown_words(new), reason)

    def set_value(self, option: Option, value: OptionValue, reason: str) -> None:
        """Write the option with a changed value."""
        self.replace(option, option.with_value(value.text), reason)

    def add(self, words: Sequence[str], reason: str) -> None:
        """Write an option that was not there."""
        self.words += words
        self.rewrite("", shown_words(words), reason)

    def refuse(self, option: Option, reason: str, remedy: str = OWN) -> None:
        """Refuse the option: it cannot be used, and cannot be left out either."""
        self._refused.append(option)
        self.refusals.append(Refusal(option=option.text, reason=reason, remedy=remedy))

    # What options hold

    def judge(
        self,
        option: Option,
        value: OptionValue,
        *,
        plain: Iterable[str] = (),
        files: Mapping[str, bool] | Iterable[str] = (),
        host: Iterable[str] = (),
    ) -> None:
        """Note all that a kept value may name on the host; anything unknown is a risk.

        Args:
            plain: keys whose text names nothing on the host, whatever it is.
            files: keys that name files to read.
            host: keys that name something on the host, in whatever form.
        """
        plain, files, host = frozenset(plain), frozenset(files), frozenset(host)
        bare = value.bare()
        for key, text in value.items():
            name = re.sub(r"\.\d+(?=\.|$)", "", key)
            if name.rpartition(".")[2] in _FD_KEYS or "/dev/fdset/" in text:
                self.refuse(option, "it uses a file descriptor that the first VM was given")
                return
            if name in files:
                if text and name in _SEARCHED:
                    self.search_file(text, option)
                elif text:
                    self.read_file(text, option)
            elif name not in plain and (name in host or key in bare or not _SCALAR.fullmatch(text)):
                self._unknown(option, key, text)

    def _unknown(self, option: Option, key: str, text: str) -> None:
        if _RUNS_PROGRAM.search(text):
            self.touch("program", "run", text, option)
        elif "/" in text:
            self.read_file(text, option, required=False)
        else:
            self.risk(option, f"Stillframe does not know what {key}={text} does")

    def disk_record(self, identity: str) -> DiskRecord | None:
        """Return what the monitor told of a disk at the instant, by its drive id or node name."""
        for disk in self.record.disks:
            if identity and identity in (disk.device, disk.node_name):
                return disk
        return None

    # Paths

    def resolve(self, path: str) -> str:
        """Return a recorded path as an absolute one; follow ``..`` as the kernel does."""
        whole = Path(self.record.cwd or "/", path)
        return os.path.realpath(whole) if ".." in whole.parts else os.path.normpath(whole)

    def read_file(self, path: str, option: Option, *, required: bool = True) -> None:
        """Note a file that QEMU reads.

        Args:
            required: QEMU does not start without it.
        """
        resolved = self.resolve(path)
        kind = "device" if resolved.startswith("/dev/") else "file"
        self.touch(kind, "read", resolved, option, required=required)  # type: ignore[arg-type]

    def search_file(self, name: str, option: Option) -> None:
        """Note a file that QEMU looks for among its own files if it is not there as named (QEMU
        ``qemu_find_file``)."""
        if "/" in name or os.path.exists(self.resolve(name)):  # noqa: PTH110 - whatever it is
            self.read_file(name, option, required=False)
        elif name and not is_firmware(name):
            self.risk(option, f"{name} is none of QEMU's own files here")
