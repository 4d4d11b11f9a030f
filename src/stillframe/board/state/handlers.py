"""Save-state handlers, and the registry of all that a machine has.

Source: QEMU ``include/migration/register.h`` (``SaveVMHandlers``), ``migration/savevm.c``
(``register_savevm_live``, ``vmstate_register_with_alias_id``,
``savevm_state_handler_insert``).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import msgspec

from stillframe.board.state.fields import StateDescription
from stillframe.board.state.state_decoder import load_state
from stillframe.board.state.state_encoder import encode_state
from stillframe.errors import NotFoundError, UsageError
from stillframe.vmstate.devices import encode_name
from stillframe.vmstate.footers import VERSION_LIMIT
from stillframe.vmstate.source import StreamSource

BytesLike: TypeAlias = bytes | bytearray | memoryview

FIRST_SECTION_ID = 2
"""QEMU's loader takes id 0 for another section; 1 is its ``block``."""


class Output(Protocol):
    """Where a stream goes; it takes all that it is given."""

    def write(self, data: BytesLike, /) -> object:
        """Take ``data``; it may not be kept beyond the call without a copy."""
        ...


class SaveStateHandler:
    """What saves and loads one thing: QEMU's ``SaveVMHandlers``. As it stands it is always active,
    has nothing to save, and loads nothing.

    Every method writes or reads a section's payload only; the framework frames it. ``iterable``:
    whether the state goes out in parts (setup, iterate, complete) or at once (save).
    """

    iterable = False

    def is_active(self) -> bool:
        """Whether there is anything to save now; False leaves all sections out."""
        return True

    def has_postcopy(self) -> bool:
        """Whether what is left can follow after the switch-over."""
        return False

    def setup(self, out: Output) -> None:
        """Write the payload of the START section."""

    def iterate(self, out: Output) -> bool:
        """Write the payload of one PART section; True if nothing is left to iterate."""
        return True

    def complete_precopy(self, out: Output) -> None:
        """Write all that is left: the payload of the END section. The machine is stopped."""

    def complete_postcopy(self, out: Output) -> None:
        """Write the payload of the END section of a postcopy."""

    def save(self, out: Output) -> None:
        """Write the payload of the FULL section. The machine is stopped."""

    def load(self, source: StreamSource, version_id: int) -> None:
        """Read the payload of any of its sections, to its last byte and no further.

        Raises:
            DataError: it is damaged.
        """

    def cleanup(self) -> None:
        """Let go of what ``setup`` took; comes on every path, also without ``setup``."""


class DeviceHandler(SaveStateHandler):
    """Handler of a device with a declared state."""

    def __init__(self, idstr: str, description: StateDescription, device: Any) -> None:
        self._idstr = idstr
        self._description = description
        self._device = device

    def is_active(self) -> bool:
        """Whether the description's ``needed`` says so: False leaves the section out."""
        needed = self._description.needed
        return needed is None or needed(self._device)

    def save(self, out: Output) -> None:
        self.save_described(out)

    def save_described(self, out: Output) -> dict[str, Any]:
        """Write the payload; gives its description."""
        payload, entry = encode_state(self._description, self._device, idstr=self._idstr)
        out.write(payload)
        return entry

    def load(self, source: StreamSource, version_id: int) -> None:
        load_state(self._description, self._device, source, version_id, idstr=self._idstr)


class Entry(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One registered handler.

    ``version_id``: what is written, and the newest that loads. ``section_id``: unique in the
    registry, never used again, and never 0. ``priority``: higher ones come first.
    """

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    priority: int
    handler: SaveStateHandler


class SaveStateRegistry:
    """All handlers of a machine, in the order in which they are saved.

    Handlers may come and go between two streams; not for several threads at once.
    """

    def __init__(self) -> None:
        self._entries: tuple[Entry, ...] = ()
        self._next_section_id = FIRST_SECTION_ID

    @property
    def entries(self) -> tuple[Entry, ...]:
        """By priority, the highest first, then in the order of registration."""
        return self._entries

    def register(
        self,
        idstr: str,
        handler: SaveStateHandler,
        *,
        version_id: int,
        instance_id: int | None = None,
        priority: int = 0,
    ) -> Entry:
        """Add a handler.

        Args:
            idstr: the sections' name.
            version_id: what is written, and the newest that loads.
            instance_id: tells handlers of the same name apart; None for the next free one.
            priority: handlers with a higher one are saved, and so loaded, before others.

        Raises:
            UsageError: the name is malformed or taken, or a number out of range.
        """
        encode_name(idstr)
        taken = [entry.instance_id for entry in self._entries if entry.idstr == idstr]
        if instance_id is None:
            instance_id = max(taken, default=-1) + 1
        if instance_id in taken:
            raise UsageError(f"section '{idstr}' {instance_id} is registered already")
        if not 0 <= instance_id <= 0xFFFFFFFF or not 0 <= version_id <= VERSION_LIMIT:
            raise UsageError(
                f"section '{idstr}' cannot have instance {instance_id} and version {version_id}"
            )
        entry = Entry(
            idstr=idstr,
            instance_id=instance_id,
            version_id=version_id,
            section_id=self._next_section_id,
            priority=priority,
            handler=handler,
        )
        self._next_section_id += 1
        # sorted() is stable: among equals the new one stays last.
        self._entries = tuple(
            sorted((*self._entries, entry), key=lambda e: e.priority, reverse=True)
        )
        return entry

    def register_device(
        self,
        idstr: str,
        description: StateDescription,
        device: Any,
        *,
        instance_id: int | None = None,
        priority: int = 0,
    ) -> Entry:
        """Add a device with a declared state; arguments and errors as :meth:`register`."""
        return self.register(
            idstr,
            DeviceHandler(idstr, description, device),
            version_id=description.version_id,
            instance_id=instance_id,
            priority=priority,
        )

    def unregister(self, idstr: str, instance_id: int = 0) -> None:
        """Remove a handler.

        Raises:
            NotFoundError: there is none.
        """
        gone = self.find(idstr, instance_id)
        if gone is None:
            raise NotFoundError(f"section '{idstr}' {instance_id} is not registered")
        self._entries = tuple(entry for entry in self._entries if entry is not gone)

    def find(self, idstr: str, instance_id: int) -> Entry | None:
        """The handler of this name and instance, or None."""
        for entry in self._entries:
            if entry.idstr == idstr and entry.instance_id == instance_id:
                return entry
        return None
