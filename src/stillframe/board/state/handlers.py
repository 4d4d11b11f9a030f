"""Save-state handlers, and the registry of a machine's handlers.

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
"""QEMU's loader would match id 0 with the wrong section; 1 is its ``block``."""


class Output(Protocol):
    """The destination of a stream."""

    def write(self, data: BytesLike, /) -> object:
        """Take all of ``data``; copy it to keep it beyond the call."""
        ...


class SaveStateHandler:
    """The base of handlers that save and load one thing: QEMU's ``SaveVMHandlers``.

    It is always active, and saves and loads nothing. Methods write or read only a section's
    payload; the framework adds the framing. ``iterable``: whether the state is sent in parts
    (setup, iterate, complete) or at once (save).
    """

    iterable = False

    def is_active(self) -> bool:
        """Return whether there is anything to save now; if not, all sections are left out."""
        return True

    def has_postcopy(self) -> bool:
        """Return whether the rest can follow after the switch-over."""
        return False

    def setup(self, out: Output) -> None:
        """Write the payload of the START section."""

    def iterate(self, out: Output) -> bool:
        """Write the payload of one PART section; return True if nothing is left to iterate."""
        return True

    def complete_precopy(self, out: Output) -> None:
        """Write the rest as the payload of the END section. The machine is stopped."""

    def complete_postcopy(self, out: Output) -> None:
        """Write the payload of the END section in postcopy."""

    def save(self, out: Output) -> None:
        """Write the payload of the FULL section. The machine is stopped."""

    def load(self, source: StreamSource, version_id: int) -> None:
        """Read the payload of any of its sections, to its last byte and no further.

        Raises:
            DataError: it is damaged.
        """

    def cleanup(self) -> None:
        """Release what ``setup`` took. Called on every path, even without ``setup``."""


class DeviceHandler(SaveStateHandler):
    """The handler of a device with a declared state."""

    def __init__(self, idstr: str, description: StateDescription, device: Any) -> None:
        self._idstr = idstr
        self._description = description
        self._device = device

    def is_active(self) -> bool:
        """Return the answer of the description's ``needed``; False leaves the section out."""
        needed = self._description.needed
        return needed is None or needed(self._device)

    def save(self, out: Output) -> None:
        self.save_described(out)

    def save_described(self, out: Output) -> dict[str, Any]:
        """Write the payload and return its description."""
        payload, entry = encode_state(self._description, self._device, idstr=self._idstr)
        out.write(payload)
        return entry

    def load(self, source: StreamSource, version_id: int) -> None:
        load_state(self._description, self._device, source, version_id, idstr=self._idstr)


class Entry(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One registered handler.

    ``version_id``: the version written, and the newest that loads. ``section_id``: unique in the
    registry, never reused, and never 0. ``priority``: higher ones are saved first.
    """

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    priority: int
    handler: SaveStateHandler


class SaveStateRegistry:
    """The handlers of a machine, in saving order.

    Handlers may be added and removed between streams. Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: tuple[Entry, ...] = ()
        self._next_section_id = FIRST_SECTION_ID

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All handlers by descending priority, then in order of registration."""
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
            idstr: the name of its sections.
            version_id: the version written, and the newest that loads.
            instance_id: distinguishes handlers of the same name; None takes the highest plus one.
            priority: handlers with a higher one are saved, and so loaded, first.

        Raises:
            UsageError: the name is malformed or taken, or a number is out of range.
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
        # sorted() is stable: the new entry stays last among those of its priority.
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
        """Return the entry of this name and instance, or None."""
        for entry in self._entries:
            if entry.idstr == idstr and entry.instance_id == instance_id:
                return entry
        return None
