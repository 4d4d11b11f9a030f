"""QMP commands for RAM: queries, and hot-plug in QEMU's two steps.

``object-add`` defines a memory backend; ``device_add`` of a ``pc-dimm`` gives it to the guest
(QEMU ``qapi/qom.json``, ``qdev.json``, ``docs/memory-hotplug.txt``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec

from stillframe.board.hardware.board import Board
from stillframe.board.hardware.layout import DIMM_GPA, DIMM_IDSTR, RAM_IDSTR
from stillframe.board.monitor.arguments import Uint64
from stillframe.board.monitor.command_set import CommandContext, CommandTable, NoArguments
from stillframe.qmp.errors import QmpError

_BACKENDS = ("memory-backend-ram", "memory-backend-memfd")
_DIMM = "pc-dimm"
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
"""QEMU ``util/id.c``: id_wellformed."""


class ObjectAdd(msgspec.Struct, frozen=True, rename="kebab"):
    """Arguments of ``object-add``, for the types that the board supports."""

    qom_type: str
    id: str
    size: Uint64


class ObjectDel(msgspec.Struct, frozen=True):
    """Arguments of ``object-del``."""

    id: str


class DeviceAdd(msgspec.Struct, frozen=True):
    """Arguments of ``device_add``, for a ``pc-dimm``."""

    driver: str
    id: str | None = None
    memdev: str | None = None


class MemoryBackend(msgspec.Struct, frozen=True):
    """Memory that the guest has or may be given. ``kind``: its QOM type."""

    kind: str
    size_bytes: int


class Hotplug:
    """The memory backends and the DIMM, with their user-given names. Guarded by the board lock.

    Args:
        migrating: returns whether the board is being saved or loaded.
    """

    def __init__(self, board: Board, migrating: Callable[[], bool]) -> None:
        self._board = board
        self._migrating = migrating
        self._waiting: dict[str, MemoryBackend] = {}
        self._dimm_names = ("dimm0", DIMM_IDSTR)  # for a DIMM that did not come by ``device_add``

    @property
    def backends(self) -> Mapping[str, MemoryBackend]:
        """All backends by id."""
        found = {RAM_IDSTR: MemoryBackend("memory-backend-memfd", self._board.config.ram_bytes)}
        if self.dimm_bytes:
            found[self._dimm_names[1]] = MemoryBackend("memory-backend-memfd", self.dimm_bytes)
        return found | self._waiting

    @property
    def dimm_bytes(self) -> int:
        """The guest's hot-plugged RAM."""
        return sum(ram.length_bytes for ram in self._board.rams if ram.idstr == DIMM_IDSTR)

    @property
    def devices(self) -> Mapping[str, str]:
        """The types of the hot-plugged devices by id."""
        return {self._dimm_names[0]: _DIMM} if self.dimm_bytes else {}

    def object_add(self, _context: CommandContext, arguments: ObjectAdd) -> None:
        kind, name = arguments.qom_type, arguments.id
        if kind not in _BACKENDS:
            raise QmpError(f"Parameter 'qom-type' does not accept value '{kind}'")
        if not _IDENTIFIER.fullmatch(name):
            raise QmpError("Parameter 'id' expects an identifier")
        if arguments.size == 0:
            raise QmpError(f"property 'size' of {kind} doesn't take value '0'")
        if name in self.backends:
            raise QmpError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        self._waiting[name] = MemoryBackend(kind, arguments.size)

    def object_del(self, _context: CommandContext, arguments: ObjectDel) -> None:
        if arguments.id not in self.backends:
            raise QmpError(f"object '{arguments.id}' not found")
        if arguments.id not in self._waiting:
            raise QmpError(f"object '{arguments.id}' is in use, can not be deleted")
        del self._waiting[arguments.id]

    def device_add(self, _context: CommandContext, arguments: DeviceAdd) -> None:
        name, memdev = arguments.id or "dimm0", arguments.memdev
        if self._migrating():
            raise QmpError("device_add not allowed while migrating")
        if arguments.driver != _DIMM:
            raise QmpError(f"'{arguments.driver}' is not a valid device model name")
        if not _IDENTIFIER.fullmatch(name):
            raise QmpError("Parameter 'id' expects an identifier")
        if name in self.devices:
            raise QmpError(f"Duplicate device ID '{name}'")
        if memdev is None:
            raise QmpError("'memdev' property must be set")
        if memdev not in self.backends:
            raise QmpError(f"Device '{memdev}' not found", "DeviceNotFound")
        if self.dimm_bytes:
            raise QmpError("no free slots available")
        if memdev not in self._waiting:
            raise QmpError(f"can't use already busy memdev: {memdev}")
        self._board.plug_dimm(self._waiting[memdev].size_bytes)
        del self._waiting[memdev]
        self._dimm_names = (name, memdev)

    def query_memdev(self, _context: CommandContext, _arguments: NoArguments) -> object:
        return [
            {
                "id": name,
                "size": backend.size_bytes,
                "merge": False,
                "dump": True,
                "prealloc": False,
                "share": True,
                "reserve": True,
                "host-nodes": [],
                "policy": "default",
            }
            for name, backend in self.backends.items()
        ]

    def query_memory_devices(self, _context: CommandContext, _arguments: NoArguments) -> object:
        if not self.dimm_bytes:
            return []
        name, memdev = self._dimm_names
        data = {
            "id": name,
            "addr": DIMM_GPA,
            "size": self.dimm_bytes,
            "slot": 0,
            "node": 0,
            "memdev": f"/objects/{memdev}",
            "hotplugged": True,
            "hotpluggable": True,
        }
        return [{"type": "dimm", "data": data}]

    def query_memory_size_summary(
        self, _context: CommandContext, _arguments: NoArguments
    ) -> object:
        return {
            "base-memory": self._board.config.ram_bytes,
            "plugged-memory": self.dimm_bytes,
        }


def add_hotplug_commands(commands: CommandTable, hotplug: Hotplug) -> None:
    """Add the commands to the table."""
    commands.add("object-add", hotplug.object_add, arguments=ObjectAdd)
    commands.add("object-del", hotplug.object_del, arguments=ObjectDel)
    commands.add("device_add", hotplug.device_add, arguments=DeviceAdd)
    commands.add("query-memdev", hotplug.query_memdev)
    commands.add("query-memory-devices", hotplug.query_memory_devices)
    commands.add("query-memory-size-summary", hotplug.query_memory_size_summary)
