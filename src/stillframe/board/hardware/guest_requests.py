"""The control thread: serves guest requests for which the vCPUs must be stopped, and ends the board
for callers that cannot wait for that.

Source: QEMU ``softmmu/runstate.c`` (main_loop_should_exit), for the order of events.
"""

from __future__ import annotations

from collections.abc import Callable

from stillframe.board.hardware.board_thread import BoardThread
from stillframe.board.hardware.power import NOTHING, Power
from stillframe.board.hardware.run_control import RunControl
from stillframe.board.hardware.vcpu import Vcpu


class GuestRequests(BoardThread):
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
            serve: carries out a request and raises nothing; called while everything is stopped.
            end: ends the board; called last by the thread, without the board lock.
        """
        super().__init__("control", control.lock)
        self._control = control
        self._power = power
        self._vcpus = vcpus
        self._serve = serve
        self._end = end

    def asked(self) -> None:
        """Park the vCPUs, so that the guest goes no further before its new request is served."""
        for vcpu in self._vcpus:
            vcpu.park()
        self._wake.notify()

    def _waiting(self) -> bool:
        return self._control.running and self._power.request != NOTHING

    def _loop(self) -> None:
        with self._control.lock:
            while not self._quit:
                if not self._waiting():
                    self._wake.wait()
                    continue
                with self._control.quiesced():
                    # Another thread may have stopped, reset or quit the board first.
                    if self._waiting():
                        request, self._power.request = self._power.request, NOTHING
                        self._serve(request)
        self._end()
