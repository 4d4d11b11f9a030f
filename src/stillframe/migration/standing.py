"""The guest stands still for the end of a live migration, and goes on if that fails.

Source: QEMU ``migration/migration.c``: migration_stop_vm, migration_iteration_finish.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from stillframe.model import Downtime

if TYPE_CHECKING:
    from stillframe.machine.board.board import Board


class GuestStandsStill:
    """A context: the guest is stopped in run state ``finish-migrate``.

    Left by an exception, its disks are active again and it is in the state that it had, or
    ``paused`` if somebody stopped it meanwhile; unless
    ``handed_over`` was called: then it stays stopped, in ``postmigrate``, in any case.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._handed_over = False
        self._began_s = self._stopped_s = self._saved_s = 0.0

    def __enter__(self) -> GuestStandsStill:
        self._began_s = time.monotonic()
        self._board.stop("finish-migrate")
        self._stopped_s = self._saved_s = time.monotonic()
        return self

    def devices_saved(self) -> None:
        """From here on it is what the destination does that takes time."""
        self._saved_s = time.monotonic()

    def handed_over(self) -> None:
        """The guest may run elsewhere from now on, and must not go on here by itself."""
        self._handed_over = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        with self._board.lock:
            if kind is None or self._handed_over:
                self._board.stop("postmigrate")
                return False
            self._board.return_from_sending()
        return False

    @property
    def downtime(self) -> Downtime:
        """For how long it has stood still."""
        return Downtime(
            stop_ms=(self._stopped_s - self._began_s) * 1e3,
            devices_ms=(self._saved_s - self._stopped_s) * 1e3,
            cont_ms=(time.monotonic() - self._saved_s) * 1e3,
        )
