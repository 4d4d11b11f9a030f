"""Exception state that a Unicorn engine exposes only in a saved context.

Unicorn reports the vector and no more. A saved context also holds the error code and the exception
being handled, which turns the next one into a double fault (QEMU ``target/i386/excp_helper.c``:
check_exception) and which Unicorn never clears by itself. Their offsets depend on Unicorn's build;
this module finds them once, by causing known faults.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

import msgspec
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3 import Uc

# mov 0x100, %ds: a general protection fault, whose error code is the selector (Intel SDM 3A, 6.13).
_PROTECTION = bytes.fromhex("8e1c2500010000")
_SELECTOR_AT = 0x100
_SELECTORS = (0x1A58, 0x7FC8, 0x3360)
_VECTOR_PROTECTION = 13
# div %ecx, which is zero
_DIVISION = bytes.fromhex("f7f1")
_VECTOR_DIVISION = 0
_NONE = 0xFFFFFFFF
_CELL_BYTES = 4


class _Places(msgspec.Struct, frozen=True):
    """Offsets in a saved context; None where not found, or ambiguous."""

    error_code: int | None
    handled: int | None


def take_error_code(engine: Uc) -> int:
    """Return the error code of the exception that ended the run, 0 if it has none.

    The exception counts as handled afterwards.
    """
    places = _places()
    saved = engine.context_save()
    code = 0
    if places.error_code is not None:
        code = _cell(saved.context, places.error_code).value
    if places.handled is not None:
        handled = _cell(saved.context, places.handled)
        if handled.value != _NONE:
            handled.value = _NONE
            engine.context_restore(saved)
    return code


def _cell(context: ctypes.c_void_p, place: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address((context.value or 0) + place)


@functools.cache
def _places() -> _Places:
    protections = [_context_after(_PROTECTION, selector) for selector in _SELECTORS]
    return _Places(
        error_code=_only(
            _cells(context, selector)
            for context, selector in zip(protections, _SELECTORS, strict=True)
        ),
        handled=_only(
            (
                _cells(protections[0], _VECTOR_PROTECTION),
                _cells(_context_after(_DIVISION, 0), _VECTOR_DIVISION),
                _cells(_context_after(b"", 0), _NONE),
            )
        ),
    )


def _only(places: Iterable[set[int]]) -> int | None:
    common = set.intersection(*places)
    return common.pop() if len(common) == 1 else None


def _cells(context: bytes, value: int) -> set[int]:
    wanted = value.to_bytes(_CELL_BYTES, "little")
    return {
        place
        for place in range(0, len(context) - _CELL_BYTES + 1, _CELL_BYTES)
        if context[place : place + _CELL_BYTES] == wanted
    }


def _context_after(code: bytes, selector: int) -> bytes:
    """Return the saved context of an engine that has executed ``code``."""
    engine = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
    engine.mem_map(0, 0x1000)
    engine.mem_write(0, code)
    engine.mem_write(_SELECTOR_AT, selector.to_bytes(2, "little"))
    engine.hook_add(uc.UC_HOOK_INTR, _stop)
    if code:
        engine.emu_start(0, len(code))
    saved = engine.context_save()
    return ctypes.string_at(saved.context, saved.size)


def _stop(engine: Uc, _vector: int, _data: object) -> None:
    engine.emu_stop()
