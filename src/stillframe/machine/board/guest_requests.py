"""The control thread: does what the guest asks for and cannot do itself, since its vCPUs must
stand still for it; and ends the board, for whoever cannot wait for that.

Source: QEMU ``softmmu/runstate.c`` (main_loop_should_exit), for the order of events.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from stillframe.machine.board.power import NOTHING, Power
from stillframe.machine.board.run_control import RunControl
from stillframe.machine.board.vcpu import Vcpu

logger = logging.getLogger(__name__)


class GuestRequests:
    """Methods are called with the board lock held, unless said."""

    def __init__(
        self,
        control: RunControl,
        power: Power,
        vcpus: tuple[Vcpu, ...],
        serve: Callable[[int], None],
        end: Callable[[], None],
    ) -> None:
        """
        Args:
            serve: does what is asked for; called while everything stands still.
            end: ends the board; called without the board lock, as the thread's last deed.
        """
        self._control = control
        self._power = power
        self._vcpus = vcpus
        self._serve = serve
        self._end = end
        self._wake = threading.Condition(control.lock)
        self._quit = False
        self._thread = threading.Thread(target=self._loop, name="stillframe-control", daemon=True)

    def start_thread(self) -> None:
        self._thread.start()

    def asked(self) -> None:
        """There is a request. The guest goes no further before it is served."""
        for vcpu in self._vcpus:
            vcpu.park()
        self._wake.notify()

    def look(self) -> None:
        """The board goes on, maybe with a request from before it was stopped."""
        self._wake.notify()

    def quit(self) -> None:
        """End the board, and the thread."""
        self._quit = True
        self._wake.notify()

    def join(self) -> None:
        """Wait for the thread's end, without the board lock."""
        if self._thread.ident is not None:
            self._thread.join()

    def _waiting(self) -> bool:
        return self._control.running and self._power.request != NOTHING

    def _loop(self) -> None:
        with self._control.lock:
            while not self._quit:
                if not self._waiting():
                    self._wake.wait()
                    continue
                with self._control.standing_still():
                    # Somebody may have stopped, reset or quit the board first.
                    if self._waiting():
                        request, self._power.request = self._power.request, NOTHING
                        self._serve_safely(request)
        self._end()

    def _serve_safely(self, request: int) -> None:
        try:
            self._serve(request)
        except Exception:  # this thread is needed to end the board
            logger.exception("request %d of the guest has failed", request)
            self._control.set_state("internal-error")
