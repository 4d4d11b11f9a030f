"""The board as its own snapshot job sees it: a machine of this very process.

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

from stillframe.errors import RefusedError
from stillframe.machine import Hindrance, MachineEvent, Mode
from stillframe.machine.board.board import Board
from stillframe.machine.outside.resume import start_time
from stillframe.memory.own_protection import Preference, WriteProtection, open_own_protection
from stillframe.model import DiskRecord, GpaRange, MachineRecord, RamBlock
from stillframe.version import __version__


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


class InsideMachine:
    """A ``Machine``: a board of this process. It raises what the board raises."""

    def __init__(self, board: Board, *, protection: Preference = "auto") -> None:
        """
        Args:
            protection: how RAM is write-protected.
        """
        self._board = board
        self._protection: Preference = protection
        self._start_time = start_time(os.getpid())

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def start_time(self) -> int:
        """When this process started; see ``/proc/PID/stat``."""
        return self._start_time

    def monitor_fd(self) -> None:
        """None: nobody has to let the guest go on if we die."""
        return

    def open_userfaultfd(self) -> WriteProtection:
        """The write protection that this host allows. The guest is not touched.

        Raises:
            HostError: there is none as wished.
        """
        return open_own_protection(self._protection)

    def process_alive(self) -> bool:
        """It does, for whoever asks."""
        return True

    def resume_at_all_costs(self) -> None:
        """Let the guest go on, if we stopped it: until then nobody else decides."""
        self._board.go_on_saved()

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
            argv=board.config.argv,
            cwd=str(Path.cwd()),
            guest_state=board.run_state,
            vcpus=board.config.vcpus,
            disks=disks,
        )

    def preflight(self, mode: Mode = "background") -> list[Hindrance]:
        """The board's migration blockers. The guest is not touched."""
        return [
            Hindrance(
                name="migration-blocker",
                reason=reason,
                remedy="remove what blocks it",
                severity="refuse",
            )
            for reason in self._board.blocked_reasons()
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
        self._board.stop_to_save()

    def cont(self) -> None:
        """Let the guest go on, if we stopped it."""
        self._board.go_on_saved()

    def refuse_unsavable(self) -> None:
        """Look once more for migration blockers.

        Raises:
            RefusedError: there is one.
        """
        for reason in self._board.blocked_reasons():
            raise RefusedError("migration-blocker", why=reason, remedy="remove what blocks it")

    def prepare_device_state(self) -> None:
        """Nothing takes time before the downtime."""

    def save_device_state(self) -> bytes:
        """The FULL sections of all devices, EOF and vmdescription; without a stream's header, since
        they follow the RAM in the stream. The guest must be stopped, and stays so."""
        buffer = io.BytesIO()
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
