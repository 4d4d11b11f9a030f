"""The migration parameters that the board supports.

Names, defaults, limits and wording are QEMU's (``migration/options.c``).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.errors import UsageError

_MOST_DOWNTIME_MS = 2000 * 1000
_MOST_BANDWIDTH = (1 << 64) - 1


class Parameters(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """The values of all parameters. QEMU's names have hyphens in place of underscores.

    ``max_bandwidth``, ``avail_switchover_bandwidth``, ``max_postcopy_bandwidth``: bytes per
    second; 0 means unlimited (for the second: measured). ``downtime_limit``: milliseconds.
    """

    max_bandwidth: int = 128 << 20
    avail_switchover_bandwidth: int = 0
    downtime_limit: int = 300
    max_postcopy_bandwidth: int = 0


NAMES = tuple(field.encode_name for field in msgspec.structs.fields(Parameters))
_LIMITS = {
    "downtime-limit": (
        _MOST_DOWNTIME_MS,
        "downtime_limit",
        "an integer in the range of 0 to (2000 * 1000) ms",
    ),
}
_BANDWIDTH_LIMIT = "an integer in the range of 0 to 18446744073709551615 bytes/second"


class ParameterTable:
    """The current parameters, and which of them were set explicitly."""

    def __init__(self) -> None:
        self._now = Parameters()
        self._chosen: set[str] = set()

    @property
    def now(self) -> Parameters:
        return self._now

    def chosen(self, name: str) -> bool:
        """Return whether a parameter was set: a default does not limit a background snapshot."""
        return name in self._chosen

    def as_dict(self) -> dict[str, int]:
        values: dict[str, int] = msgspec.to_builtins(self._now)
        return values

    def set(self, wanted: Mapping[str, object]) -> None:
        """Set parameters, all or none. A running migration follows the change.

        Raises:
            UsageError: an unknown parameter, or a value out of range or of the wrong type.
        """
        values = self.as_dict()
        for name, value in wanted.items():
            if name not in NAMES:
                raise UsageError(f"Parameter '{name}' is unexpected")
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"Parameter '{name}' expects uint64")
            most, spelled, range_text = _LIMITS.get(
                name, (_MOST_BANDWIDTH, name.replace("-", "_"), _BANDWIDTH_LIMIT)
            )
            if not 0 <= value <= most:
                raise UsageError(f"Parameter '{spelled}' expects {range_text}")
            values[name] = value
        self._now = msgspec.convert(values, Parameters)
        self._chosen.update(wanted)
