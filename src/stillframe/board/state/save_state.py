"""The saving of a machine, in steps shared by background snapshot, precopy and postcopy.

====================================  ================================================
:class:`StateSaver`                   QEMU ``migration/savevm.c``
====================================  ================================================
``header``                            ``qemu_savevm_state_header``
``setup``                             ``qemu_savevm_state_setup``
``iterate``                           ``qemu_savevm_state_iterate``
``complete_precopy``                  ``qemu_savevm_state_complete_precopy``
``save_all_device_states``            ``qemu_savevm_state_complete_precopy_non_iterable``
``complete_postcopy``                 ``qemu_savevm_state_complete_postcopy``
``cleanup``                           ``qemu_savevm_state_cleanup``
====================================  ================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from stillframe.board.state.fields import StateDescription, describe_state, u32, variable_buffer
from stillframe.board.state.handlers import (
    BytesLike,
    DeviceHandler,
    Entry,
    Output,
    SaveStateRegistry,
)
from stillframe.vmstate import writer
from stillframe.vmstate.devices import section_footer, section_header
from stillframe.vmstate.wire import NAME_LIMIT_BYTES, SectionType


class StateSaver:
    """The writer of one machine's stream.

    A handler's exception reaches the caller, which then calls :meth:`cleanup`. Except for
    ``inactivate_disks``, nothing here stops, starts or changes the machine.

    Args:
        machine_type: its name in the configuration section.
        inactivate_disks: releases the disks, so that the destination may open them.
        target_page_bytes: the page size in the vmdescription.
    """

    def __init__(
        self,
        registry: SaveStateRegistry,
        *,
        machine_type: str,
        inactivate_disks: Callable[[], None],
        target_page_bytes: int = 4096,
    ) -> None:
        self._registry = registry
        self._machine_type = machine_type
        self._inactivate_disks = inactivate_disks
        self._target_page_bytes = target_page_bytes

    def header(self, out: Output) -> None:
        """Write magic, version and the configuration section."""
        out.write(writer.stream_header() + writer.configuration_section(self._machine_type))

    def setup(self, out: Output) -> None:
        """Write the START section of every active iterable handler."""
        for entry in self._active_iterables():
            with _section(out, SectionType.START, entry):
                entry.handler.setup(out)

    def iterate(self, out: Output, *, in_postcopy: bool = False) -> bool:
        """Write a PART section for each handler in turn, up to the first that has more to send.

        Args:
            in_postcopy: whether the guest already runs at the destination, so that only handlers
                with postcopy have anything left.

        Returns:
            Whether no handler has anything left.
        """
        for entry in self._active_iterables():
            if in_postcopy and not entry.handler.has_postcopy():
                continue
            with _section(out, SectionType.PART, entry):
                done = entry.handler.iterate(out)
            if not done:
                # As in QEMU: the next handler would only synchronize over and over.
                return False
        return True

    def complete_precopy(
        self,
        out: Output,
        *,
        iterable_only: bool,
        inactivate_disks: bool,
        in_postcopy: bool = False,
    ) -> None:
        """Write the rest of the stopped machine's state.

        Args:
            iterable_only: whether to write only the END sections of iterable handlers;
                otherwise :meth:`save_all_device_states` follows.
            inactivate_disks: as for :meth:`save_all_device_states`.
            in_postcopy: whether the switch-over to postcopy has begun: the stream and the handlers
                with postcopy go on later. Then ``iterable_only`` writes the END sections of the
                other handlers, and a call without it only the device states.
        """
        if iterable_only or not in_postcopy:
            for entry in self._active_iterables():
                if in_postcopy and entry.handler.has_postcopy():
                    continue
                with _section(out, SectionType.END, entry):
                    entry.handler.complete_precopy(out)
        if not iterable_only:
            self.save_all_device_states(
                out, inactivate_disks=inactivate_disks, send_eof=not in_postcopy
            )

    def save_all_device_states(
        self,
        out: Output,
        *,
        inactivate_disks: bool,
        send_eof: bool,
        end: Output | None = None,
    ) -> None:
        """Write the FULL section of every handler that is not iterable; the machine is stopped.

        Args:
            inactivate_disks: whether to release the disks after the last section and before EOF, so
                that a reader of EOF may open them.
            send_eof: whether EOF and vmdescription follow; otherwise the stream goes on.
            end: takes EOF and vmdescription instead of ``out``, to be sent later.
        """
        devices: list[dict[str, Any]] = []
        for entry in self._registry.entries:
            if not entry.handler.iterable and entry.handler.is_active():
                devices.append(_save_full(out, entry))
        if inactivate_disks:
            self._inactivate_disks()
        if send_eof:
            end = end or out
            end.write(writer.eof())
            end.write(
                writer.vmdescription(
                    {
                        "configuration": _describe_configuration(self._machine_type),
                        "page_size": self._target_page_bytes,
                        "devices": devices,
                    }
                )
            )

    def complete_postcopy(self, out: Output) -> None:
        """Write the END sections of handlers with postcopy, then EOF."""
        for entry in self._active_iterables():
            if entry.handler.has_postcopy():
                with _section(out, SectionType.END, entry):
                    entry.handler.complete_postcopy(out)
        out.write(writer.eof())

    def cleanup(self) -> tuple[Exception, ...]:
        """Call every handler's cleanup; for every path, including errors. Never raises.

        Returns:
            The exceptions that handlers raised.
        """
        errors: list[Exception] = []
        for entry in self._registry.entries:
            try:
                entry.handler.cleanup()
            except Exception as error:  # noqa: BLE001 - the other handlers still need their cleanup
                errors.append(error)
        return tuple(errors)

    def _active_iterables(self) -> Iterator[Entry]:
        for entry in self._registry.entries:
            if entry.handler.iterable and entry.handler.is_active():
                yield entry


@contextmanager
def _section(out: Output, kind: SectionType, entry: Entry) -> Iterator[None]:
    """Frame what is written inside with header and footer; no footer after an error."""
    out.write(
        section_header(
            kind,
            section_id=entry.section_id,
            idstr=entry.idstr,
            instance_id=entry.instance_id,
            version_id=entry.version_id,
        )
    )
    yield
    out.write(section_footer(entry.section_id))


class _CountingOutput:
    """An output that passes bytes on and counts them."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self.written_bytes = 0

    def write(self, data: BytesLike, /) -> None:
        self._out.write(data)
        self.written_bytes += memoryview(data).nbytes


def _save_full(out: Output, entry: Entry) -> dict[str, Any]:
    """Write the FULL section and return its entry for the vmdescription."""
    described: dict[str, Any] = {"name": entry.idstr, "instance_id": entry.instance_id}
    with _section(out, SectionType.FULL, entry):
        handler = entry.handler
        if isinstance(handler, DeviceHandler):
            described |= handler.save_described(out)
        else:
            # One buffer, as in QEMU's vmstate_save_old_style.
            counting = _CountingOutput(out)
            handler.save(counting)
            size = counting.written_bytes
            described["size"] = size
            described["fields"] = [{"name": "data", "size": size, "type": "buffer"}]
    return described


def _describe_configuration(machine_type: str) -> dict[str, Any]:
    """Return the configuration section's vmdescription entry, as QEMU 8.2 and later write it."""
    return describe_state(_CONFIGURATION, _Configuration(machine_type.encode("ascii")))


class _Configuration(msgspec.Struct):
    """The configuration section's fields, named as in the description."""

    name: bytes

    @property
    def len(self) -> int:
        return len(self.name)


_CONFIGURATION = StateDescription(
    name="configuration",
    version_id=1,
    minimum_version_id=1,
    fields=(u32("len"), variable_buffer("name", "len", limit_bytes=NAME_LIMIT_BYTES)),
)
