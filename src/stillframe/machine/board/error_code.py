"""The error code of the exception that an engine ran into.

Unicorn tells the vector only, but a saved context holds the code too, at a place that depends on
Unicorn's build. The place is found once, by faults whose codes are known.
"""

from __future__ import annotations

import ctypes
import functools

from unicorn import unicorn_const as uc
from unicorn.unicorn_py3 import Uc

# mov 0x100, %ds: faults with the selector as its error code (Intel SDM 3A, 6.13).
_CODE = bytes.fromhex("8e1c2500010000")
_SELECTOR_AT = 0x100
_PROBES = (0x1A58, 0x7FC8, 0x3360)
_CODE_BYTES = 4


def last_error_code(engine: Uc) -> int:
    """The error code of the engine's last exception that had one; 0 if Unicorn hides it."""
    place = _place()
    if place is None:
        return 0
    context = _context(engine)
    return int.from_bytes(context[place : place + _CODE_BYTES], "little")


def _context(engine: Uc) -> bytes:
    saved = engine.context_save()
    return ctypes.string_at(saved.context, saved.size)


@functools.cache
def _place() -> int | None:
    places: set[int] | None = None
    for selector in _PROBES:
        found = _places_of(selector)
        places = found if places is None else places & found
    return places.pop() if places is not None and len(places) == 1 else None


def _places_of(selector: int) -> set[int]:
    engine = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
    engine.mem_map(0, 0x1000)
    engine.mem_write(0, _CODE)
    engine.mem_write(_SELECTOR_AT, selector.to_bytes(2, "little"))
    engine.hook_add(uc.UC_HOOK_INTR, _stop)
    engine.emu_start(0, len(_CODE))
    context = _context(engine)
    wanted = selector.to_bytes(_CODE_BYTES, "little")
    return {
        place
        for place in range(0, len(context) - _CODE_BYTES + 1, _CODE_BYTES)
        if context[place : place + _CODE_BYTES] == wanted
    }


def _stop(engine: Uc, _vector: int, _data: object) -> None:
    engine.emu_stop()
