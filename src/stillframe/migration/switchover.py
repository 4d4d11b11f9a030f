"""When a live migration may stop the guest: what is left can be sent within the downtime limit.

Source: QEMU ``migration/migration.c``: migration_update_counters, migration_iteration_run. Other
than there, all pages were sent once before, and nothing is on its way when the guest is stopped.
"""

from __future__ import annotations

from stillframe.migration.live import LiveTransfer


class Switchover:
    """Decides for one migration."""

    def __init__(self, live: LiveTransfer) -> None:
        self._live = live
        self._through = False

    def is_near(self) -> bool:
        """Whether little is left of what was known to be dirty at the last look."""
        left_bytes = self._live.ram.remaining_bytes
        self._through = self._through or left_bytes == 0
        return left_bytes <= self._most_bytes()

    def is_due(self) -> bool:
        """Whether little is left, also of what the guest has written since; if not, it begins
        another round.

        Raises:
            SinkError, DataError: the destination failed. SnapshotCancelled: it was cancelled.
        """
        self._live.drain()
        self._live.ram.sync()
        return self._live.ram.remaining_bytes <= self._most_bytes()

    def _most_bytes(self) -> float:
        """What can be sent while the guest stands still."""
        if not self._through:
            return 0.0
        parameters = self._live.task.parameters.now
        speed = parameters.avail_switchover_bandwidth or self._live.speed.bytes_per_s
        return speed * parameters.downtime_limit / 1e3
