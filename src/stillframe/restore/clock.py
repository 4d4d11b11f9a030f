"""The guest's real-time clock after a restore.

QEMU's RTC counts the host's time on from its last update (``hw/rtc/mc146818rtc.c``,
get_guest_rtc_ns), so a restored guest's RTC shows the host's time, as if the guest had only been
stopped. To make it go on from the instant, the host times in the saved state are moved by the time
in between.
"""

from __future__ import annotations

import struct
import time

from stillframe.errors import RefusedError
from stillframe.restore.builder import Builder
from stillframe.restore.plan_source import PlanSource
from stillframe.restore.planners import Clock
from stillframe.still.instant import instant_of

_RTC = "mc146818rtc"
_TIMES = struct.Struct(">QQqqQ")
"""base_rtc (s), last_update, offset, update_timer (-1 unarmed), next_alarm_time (ns)."""
_TIMES_OFFSET = 128 + 1 + 28 + 8 + 8 + 24 + 4 + 4
_HEADER = struct.Struct(">B11sII")
"""The section's header after type and id: name, instance, version (QEMU ``migration/savevm.c``)."""
_VERSION = 3
_HOSTS_TIME = (
    "its RTC shows the host's time; the guest's own clock goes on from the instant,"
    " until the guest sets it"
)
_INSTANTS_TIME = "its RTC and the guest's own clock go on from the instant"


def clock_shift_ns(snapshot: PlanSource, clock: Clock, builder: Builder) -> int:
    """Return how far the RTC is to be set back; the plan notes what it will show.

    Raises:
        RefusedError: the machine has no RTC that can be set back.
    """
    own_clock = any(
        option.name == "rtc" and "clock=" in option.value and "clock=host" not in option.value
        for option in (*builder.recorded, *builder.own)
    )
    if own_clock:  # -rtc clock=vm: the guest's time alone
        builder.note(_INSTANTS_TIME)
        return 0
    if clock == "host":
        builder.note(_HOSTS_TIME)
        return 0
    if not any(s.idstr == _RTC and len(s.payload) > _TIMES_OFFSET + _TIMES.size - 1
               for s in snapshot.skeleton().devices):  # fmt: skip
        raise RefusedError(
            "cannot set the guest's RTC back",
            why="the snapshot holds no RTC of a PC",
            remedy="leave --clock instant out, and set the guest's clock yourself",
            guest_state="none",
        )
    builder.note(_INSTANTS_TIME)
    instant = instant_of(snapshot.manifest.created)
    return time.time_ns() - int(instant.timestamp() * 1_000_000_000)


def set_back(piece: bytes, shift_ns: int) -> tuple[bytes, bool]:
    """Set the RTC back in a piece of the stream outside of RAM; return the piece, and whether the
    RTC was in it."""
    header = _HEADER.pack(len(_RTC), _RTC.encode(), 0, _VERSION)
    at = piece.find(header)
    start = at + len(header) + _TIMES_OFFSET
    if at < 0 or start + _TIMES.size > len(piece):
        return piece, False
    base, updated, offset, timer, alarm = _TIMES.unpack_from(piece, start)
    times = _TIMES.pack(
        base,
        updated + shift_ns,
        offset,
        timer + shift_ns if timer >= 0 else timer,
        alarm + shift_ns if alarm not in (0, (1 << 64) - 1) else alarm,
    )
    return piece[:start] + times + piece[start + len(times) :], True
