"""A board of this process as a machine, for the snapshot job.

No guard is needed, since the guest dies with us. Whoever serves faults never takes the board lock
or the GIL, so every method may wait for a fault.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from stillframe.board.board_command import command_of
from stillframe.board.hardware.board import Board
from stillframe.board.hardware.run_control import SAVING
from stillframe.board.memory.own_protection import Preference, open_own_protection
from stillframe.capture.write_protection import WriteProtection
from stillframe.machine import Blocker, MachineEvent, Mode, Moment
from stillframe.machine.process.resume import start_time
from stillframe.model import DiskRecord, GpaRange, MachineRecord, RamBlock
from stillframe.version import __version__
from stillframe.vmstate.writer import stream_header


class BoardWatch:
    """Collects a board's events until ``close``."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._seen: list[MachineEvent] = []
        board.add_listener(self._note)

    def _note(self, name: str, data: dict[str, object]) -> None:
        event = MachineEvent(name=name, data=data, received_s=time.monotonic())
        with self._lock:
            self._seen.append(event)

    def seen(self) -> list[MachineEvent]:
        """The events so far, oldest first; they stay in the list."""
        with self._lock:
            return list(self._seen)

    def close(self) -> None:
        """End watching; never raises."""
        self._board.remove_listener(self._note)


class LocalBoard:
    """A ``Machine``: a board of this process. It raises what the board raises."""

    def __init__(self, board: Board, *, protection: Preference = "auto") -> None:
        """
        Args:
            protection: how RAM is write-protected.
        """
        self._board = board
        self._protection: Preference = protection
        self._stopped = False
        self._start_time = start_time(os.getpid())

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def lock_name(self) -> str:
        """This process, and in it the board: others of it may be saved at the same time."""
        return f"{os.getpid()}-{self._start_time}-{self._board.rams[0].hva:x}"

    def monitor_fd(self) -> None:
        """None: nobody has to let the guest go on if we die."""
        return

    def open_write_protection(self) -> WriteProtection:
        """The write protection that this host allows. The guest is not touched.

        Raises:
            HostError: there is none as wished.
        """
        return open_own_protection(self._protection)

    def process_alive(self) -> bool:
        """True: it is this process."""
        return True

    def resume_at_all_costs(self) -> None:
        """As ``cont``: until then nobody else decides."""
        self.cont()

    def describe(self) -> MachineRecord:
        """What the board is. The guest is not touched."""
        board = self._board
        path = board.config.disk_path
        disks = () if path is None else (_disk(path),)
        return MachineRecord(
            name=board.name,
            pid=os.getpid(),
            uid=os.getuid(),
            vmm="board",
            vmm_version=__version__,
            machine_type=board.machine_type,
            accelerator="unicorn",
            executable=sys.executable,
            argv=board.config.argv or command_of(board.config).words(),
            cwd="/",
            guest_state=board.run_state,
            vcpus=board.config.vcpus,
            disks=disks,
        )

    def preflight(self, mode: Mode = "background", moment: Moment = "first") -> list[Blocker]:
        """The board's migration blockers. The guest is not touched."""
        return [
            Blocker(
                name="migration-blocker",
                reason=reason,
                remedy="remove what blocks it",
                severity="refuse",
            )
            for reason in (self._board.blocked_reasons() if moment != "saved" else ())
        ]

    def ram_blocks(self) -> list[RamBlock]:
        """The board's RAM blocks, in its order."""
        return self._board.ram_blocks()

    def blocks_signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Equal to an earlier one as long as no block was plugged in."""
        return tuple(
            (ram.idstr, ram.hva, ram.length_bytes, ram.length_bytes) for ram in self._board.rams
        )

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Where the guest sees these blocks."""
        wanted = {block.idstr for block in blocks}
        return tuple(place for place in self._board.memory_map() if place.idstr in wanted)

    def status(self) -> str:
        """The run state in QEMU's words."""
        return self._board.run_state

    def stop(self) -> None:
        """Stop a guest that runs, to be saved; another one stays as it is. What others want of one
        that runs waits until ``cont``."""
        if not (self._stopped and self._board.run_state == SAVING):
            self._board.stop_to_save()
            self._stopped = True

    def announce_cont(self) -> None:
        """Nothing can be done for it in advance."""

    def cont(self) -> None:
        """Let the guest go on, if we stopped it."""
        self._stopped = False
        self._board.go_on_saved()

    def prepare_device_state(self) -> None:
        """Nothing takes time before the downtime."""

    def save_device_state(self, then: object = None) -> bytes:
        """The stream's header, the FULL sections of all devices, EOF and vmdescription. The guest
        must be stopped, and stays so."""
        buffer = io.BytesIO(stream_header())
        buffer.seek(0, io.SEEK_END)
        with self._board.lock:
            self._board.saver.save_all_device_states(buffer, inactivate_disks=False, send_eof=True)
        return buffer.getvalue()

    def finish_device_state(self) -> None:
        """Nothing was prepared."""

    def watch(self) -> BoardWatch:
        """Begin to collect events."""
        return BoardWatch(self._board)

    def close(self) -> None:
        """The board stays as it is."""


def _disk(path: str) -> DiskRecord:
    return DiskRecord(
        device="disk0",
        qdev="",
        node_name="disk0",
        filename=str(Path(path).resolve()),
        driver="raw",
        read_only=False,
    )
