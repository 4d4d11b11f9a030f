"""QMP commands that write files: screendump, pmemsave, xen-save-devices-state.

A file name may be ``/dev/fdset/N``. Files are created with mode 0600: the guest's screen is as
secret as its RAM.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Literal

import msgspec

from stillframe.board.hardware.board import Board
from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.qmp.errors import QmpError
from stillframe.vmstate import writer

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_PRIVATE = 0o600
_STEP_BYTES = 1 << 20
_PMEMSAVE_MAX_BYTES = 1 << 40
_ADDRESSES = 1 << 64


class Screendump(msgspec.Struct, frozen=True):
    """Arguments of ``screendump`` (QEMU ``qapi/ui.json``)."""

    filename: str
    device: str | None = None
    head: int | None = None
    format: Literal["ppm", "png"] = "ppm"


class Pmemsave(msgspec.Struct, frozen=True):
    """Arguments of ``pmemsave`` (QEMU ``qapi/machine.json``)."""

    val: int
    size: int
    filename: str


class SaveDevicesState(msgspec.Struct, frozen=True):
    """Arguments of ``xen-save-devices-state`` (QEMU ``qapi/migration.json``)."""

    filename: str
    live: bool = True


def add_file_commands(commands: CommandTable, board: Board) -> None:
    """Add the commands to the table. Reading RAM needs no lock and may take long."""

    def screendump(context: CommandContext, arguments: Screendump) -> None:
        _screendump(board, context, arguments)

    def pmemsave(context: CommandContext, arguments: Pmemsave) -> None:
        _pmemsave(board, context, arguments)

    def save_devices_state(context: CommandContext, arguments: SaveDevicesState) -> None:
        _save_devices_state(board, context, arguments)

    commands.add("screendump", screendump, arguments=Screendump, locked=False)
    commands.add("pmemsave", pmemsave, arguments=Pmemsave, locked=False)
    commands.add("xen-save-devices-state", save_devices_state, arguments=SaveDevicesState)


def _screendump(board: Board, context: CommandContext, arguments: Screendump) -> None:
    if arguments.device is not None:
        raise QmpError(f"Device '{arguments.device}' not found", "DeviceNotFound")
    if arguments.head is not None:
        raise QmpError("'head' must be specified together with 'device'")
    picture = board.picture()
    data = picture.png() if arguments.format == "png" else picture.ppm()
    try:
        fd = context.fds.open_file(arguments.filename, _WRITE, _PRIVATE)
    except OSError as error:
        raise QmpError(f"failed to open file '{arguments.filename}': {error.strerror}") from error
    _write(fd, iter((data,)))


def _pmemsave(board: Board, context: CommandContext, arguments: Pmemsave) -> None:
    start = arguments.val % _ADDRESSES
    if not 0 <= arguments.size <= min(_PMEMSAVE_MAX_BYTES, _ADDRESSES - start):
        raise QmpError(f"Invalid addr {start:#018x}/size {arguments.size} specified")
    try:
        fd = context.fds.open_file(arguments.filename, _WRITE, _PRIVATE)
    except OSError as error:
        raise QmpError(f"Could not open '{arguments.filename}': {error.strerror}") from error
    _write(fd, _physical_memory(board, start, start + arguments.size))


def _physical_memory(board: Board, start: int, end: int) -> Iterator[bytes]:
    """Yield the guest-physical range [start, end); zeros where no RAM is mapped."""
    rams = {ram.idstr: ram for ram in board.rams}
    at = start
    for place in board.memory_map():
        first, last = max(place.gpa, at), min(place.gpa + place.length_bytes, end)
        if first >= last:
            continue
        yield from _zeros(first - at)
        for gpa in range(first, last, _STEP_BYTES):
            length_bytes = min(_STEP_BYTES, last - gpa)
            offset_bytes = place.offset_bytes + gpa - place.gpa
            yield rams[place.idstr].read(offset_bytes, length_bytes)
        at = last
    yield from _zeros(end - at)


def _zeros(length_bytes: int) -> Iterator[bytes]:
    for at in range(0, length_bytes, _STEP_BYTES):
        yield bytes(min(_STEP_BYTES, length_bytes - at))


def _save_devices_state(board: Board, context: CommandContext, arguments: SaveDevicesState) -> None:
    """Save the non-iterable sections, without configuration section and vmdescription.

    Source: QEMU ``migration/savevm.c``: qmp_xen_save_devices_state.
    """
    try:
        fd = context.fds.open_file(arguments.filename, _WRITE, _PRIVATE)
    except OSError as error:
        raise QmpError(f"Unable to open {arguments.filename}: {error.strerror}") from error
    state = io.BytesIO()
    was_running = board.run_state == "running"
    try:
        if was_running:
            board.stop("save-vm")
        try:
            state.write(writer.stream_header())
            board.saver.save_all_device_states(state, inactivate_disks=False, send_eof=False)
            state.write(writer.eof())
            if arguments.live and not was_running:
                board.inactivate_disks()
        finally:
            if was_running:
                board.cont()
    except BaseException:
        os.close(fd)
        raise
    _write(fd, iter((state.getvalue(),)))


def _write(fd: int, parts: Iterator[bytes]) -> None:
    """Write all parts, and close.

    Raises:
        QmpError: a write fails.
    """
    try:
        with open(fd, "wb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
    except OSError as error:
        raise QmpError(f"An IO error has occurred: {error.strerror}") from error
