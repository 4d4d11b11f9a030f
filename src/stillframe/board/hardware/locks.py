"""The lock units, which vCPUs use in place of atomic instructions (ports 0x580 to 0x58f)."""

from __future__ import annotations

from stillframe.board.state.fields import StateDescription, array, boolean

LOCK_UNITS = 16


class LockUnits:
    """The lock units. Guarded by the board lock, which makes taking one atomic."""

    COUNT = LOCK_UNITS

    def __init__(self) -> None:
        self.held = [False] * LOCK_UNITS

    def reset(self) -> None:
        self.held[:] = [False] * LOCK_UNITS

    def read_port(self, offset: int, size_bytes: int, vcpu: int) -> int:
        """Return 1 if this read took the lock, 0 if it is held."""
        if self.held[offset]:
            return 0
        self.held[offset] = True
        return 1

    def write_port(self, offset: int, size_bytes: int, value: int, vcpu: int) -> None:
        """Release the lock, whatever the value."""
        self.held[offset] = False


LOCKS = StateDescription(
    name="locks",
    version_id=1,
    minimum_version_id=1,
    fields=(array("held", boolean, LOCK_UNITS),),
)
