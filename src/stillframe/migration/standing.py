"""The guest stands still for the end of a live migration, and goes on if that fails.

Source: QEMU ``migration/migration.c``: migration_stop_vm, migration_iteration_finish.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

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
        self._began_s = 0.0

    def __enter__(self) -> GuestStandsStill:
        self._began_s = time.monotonic()
        self._board.stop("finish-migrate")
        return self

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
    def passed_ms(self) -> float:
        """For how long it has stood still, milliseconds."""
        return (time.monotonic() - self._began_s) * 1e3
