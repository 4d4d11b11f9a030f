"""A board of this process as a machine, for the snapshot job.

It needs no guard process, since the guest dies with this one. The thread that serves faults never
takes the board lock or the GIL, so every method may wait for a fault.
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
        """Return the events so far, oldest first, without removing them."""
        with self._lock:
            return list(self._seen)

    def close(self) -> None:
        """Stop collecting; never raises."""
        self._board.remove_listener(self._note)


class LocalBoard:
    """A ``Machine``: a board of this process. Its methods raise what the board raises."""

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
        """This process and, in it, this board: another can be saved at the same time."""
        return f"{os.getpid()}-{self._start_time}-{self._board.rams[0].hva:x}"

    def monitor_fd(self) -> None:
        """Return None: the guest dies with this process, so no guard has to resume it."""
        return

    def open_write_protection(self) -> WriteProtection:
        """Open the write protection that this host allows. Does not touch the guest.

        Raises:
            HostError: the required one is not available.
        """
        return open_own_protection(self._protection)

    def process_alive(self) -> bool:
        """Return True: it is this process."""
        return True

    def resume_at_all_costs(self) -> None:
        """As ``cont``: no other caller can change the run state before it."""
        self.cont()

    def describe(self) -> MachineRecord:
        """Describe the board. Does not touch the guest."""
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
        """Return the board's migration blockers, none once RAM is saved. The guest is untouched."""
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
        """Return the board's RAM blocks, in its order."""
        return self._board.ram_blocks()

    def blocks_signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Return a value that stays equal until a block is plugged in."""
        return tuple(
            (ram.idstr, ram.hva, ram.length_bytes, ram.length_bytes) for ram in self._board.rams
        )

    def memory_map(self, blocks: Sequence[RamBlock]) -> tuple[GpaRange, ...]:
        """Return where the guest sees these blocks."""
        wanted = {block.idstr for block in blocks}
        return tuple(place for place in self._board.memory_map() if place.idstr in wanted)

    def status(self) -> str:
        """Return the run state in QEMU's terms."""
        return self._board.run_state

    def stop(self) -> None:
        """Stop a running guest to save it; leave any other as it is. While a running guest is
        stopped so, other callers' changes to it wait for ``cont``."""
        if not (self._stopped and self._board.run_state == SAVING):
            self._board.stop_to_save()
            self._stopped = True

    def announce_cont(self) -> None:
        """Do nothing: ``cont`` needs no preparation."""

    def cont(self) -> None:
        """Resume the guest, if ``stop`` stopped it."""
        self._stopped = False
        self._board.go_on_saved()

    def prepare_device_state(self) -> None:
        """Do nothing: saving needs no slow preparation."""

    def save_device_state(self, then: object = None) -> bytes:
        """Return the stream's header, the FULL sections of all devices, EOF and vmdescription. The
        guest must be stopped, and stays stopped."""
        buffer = io.BytesIO(stream_header())
        buffer.seek(0, io.SEEK_END)
        with self._board.lock:
            self._board.saver.save_all_device_states(buffer, inactivate_disks=False, send_eof=True)
        return buffer.getvalue()

    def finish_device_state(self) -> None:
        """Do nothing: nothing was prepared."""

    def watch(self) -> BoardWatch:
        """Start collecting events."""
        return BoardWatch(self._board)

    def close(self) -> None:
        """Do nothing: the board stays as it is."""


def _disk(path: str) -> DiskRecord:
    return DiskRecord(
        device="disk0",
        qdev="",
        node_name="disk0",
        filename=str(Path(path).resolve()),
        driver="raw",
        read_only=False,
    )
