"""A board without an emulator: RAM that a thread writes, one device, a run state.

For tests of the migration itself; the real board is in the integration tests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.state.fields import StateDescription, u64
from stillframe.board.state.global_state import GLOBAL_STATE, GlobalState
from stillframe.board.state.handlers import SaveStateRegistry
from stillframe.board.state.save_state import StateSaver

PAGE = 4096

COUNTER = StateDescription(
    name="counter",
    version_id=1,
    minimum_version_id=1,
    fields=(u64("number"),),
    pre_save=lambda board: board.before_save(),
)


class ToyBoard:
    """Its guest writes a running number at the start of one page after the other; the device
    holds the last number."""

    machine_type = "toy-board-1"

    def __init__(self, *, ram_bytes: int = 4 << 20, pages_per_s: int = 5000) -> None:
        self.lock = threading.RLock()
        self.rams = (GuestRam("board.ram", ram_bytes), GuestRam("board.vram", 16 * PAGE))
        self.run_state = "prelaunch"
        self.history: list[str] = []
        self.number = 0
        self.disks_active = True
        self.blockers: list[str] = []
        self.autostart = True
        self.on_save: Callable[[], None] | None = None
        self._stored: str | None = None
        self.global_state = GlobalState(lambda: self._stored or self.run_state)
        self.registry = SaveStateRegistry()
        self.registry.register_device("globalstate", GLOBAL_STATE, self.global_state)
        self.registry.register_device("counter", COUNTER, self)
        self.saver = StateSaver(
            self.registry, machine_type=self.machine_type, inactivate_disks=self.inactivate_disks
        )
        self._pages_per_s = pages_per_s
        self._running = threading.Event()
        self._step = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._guest, daemon=True)
        self._thread.start()

    # --- the guest ---------------------------------------------------------------------

    def _guest(self) -> None:
        while not self._ended:
            if not self._running.wait(0.1):
                continue
            began = time.monotonic()
            for _ in range(max(1, self._pages_per_s // 500)):
                with self._step:
                    if self._running.is_set():
                        self._write_one()
            time.sleep(max(0.0, 0.002 - (time.monotonic() - began)))

    def _write_one(self) -> None:
        ram = self.rams[0]
        pages = ram.length_bytes // PAGE
        ram.write(self.number % pages * PAGE, (self.number + 1).to_bytes(8, "little"))
        self.number += 1

    def consistent(self) -> bool:
        """Whether RAM and the device show one instant: each page holds the last number that was
        written to it before the device's."""
        ram = self.rams[0]
        pages = ram.length_bytes // PAGE
        content = ram.read(0, ram.length_bytes)
        for page in range(pages):
            found = int.from_bytes(content[page * PAGE : page * PAGE + 8], "little")
            last = (self.number - 1 - page) // pages * pages + page + 1 if self.number > page else 0
            if found != last:
                return False
        return True

    # --- what the migration uses ---------------------------------------------------------

    def ram_blocks(self) -> list[object]:
        return [ram.block() for ram in self.rams]

    def blocked_reasons(self) -> list[str]:
        return list(self.blockers)

    def _enter(self, state: str) -> None:
        self.run_state = state
        self.history.append(state)

    def power_on(self) -> None:
        with self.lock:
            for _ in range(self.rams[0].length_bytes // PAGE):
                self._write_one()
            self._enter("running")
            self._running.set()

    def start_incoming(self) -> None:
        self._enter("inmigrate")

    def stop(self, state: str = "paused") -> None:
        with self.lock:
            if state == "finish-migrate":
                self._stored = self.run_state
            self._running.clear()
            with self._step:  # the guest's present step is over
                pass
            self._enter(state)

    def cont(self) -> None:
        with self.lock:
            self._stored = None
            self._enter("running")
            self._running.set()

    def return_from_sending(self) -> None:
        self.activate_disks()
        if self._stored == "running":
            self.cont()
        else:
            self._enter(str(self._stored))

    def finish_incoming(self) -> None:
        with self.lock:
            stored = self.global_state.run_state
            if stored == "running" and self.autostart:
                self.activate_disks()
                self.cont()
            else:
                self._enter("paused" if stored == "running" else stored)

    def before_save(self) -> None:
        if self.on_save is not None:
            self.on_save()

    def activate_disks(self) -> None:
        self.disks_active = True

    def inactivate_disks(self) -> None:
        self.disks_active = False

    def is_progressing(self) -> bool:
        """Whether the guest writes now."""
        before = self.number
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.number > before:
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        self._ended = True
        self._running.clear()
        self._thread.join()
        for ram in self.rams:
            ram.close()
