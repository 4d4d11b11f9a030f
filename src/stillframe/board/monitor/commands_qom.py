"""QMP commands on the object tree: qom-list and qom-get (QEMU ``qapi/qom.json``).

The board's tree is small and holds what tools ask QEMU for: the machine's type, memory backends and
hot-plugged devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.board.hardware.board import Board
from stillframe.board.monitor.command_set import CommandContext, CommandTable
from stillframe.board.monitor.commands_hotplug import Hotplug
from stillframe.qmp.errors import QmpError


class QomList(msgspec.Struct, frozen=True):
    """Arguments of ``qom-list``."""

    path: str


class QomGet(msgspec.Struct, frozen=True):
    """Arguments of ``qom-get``."""

    path: str
    property: str


class _Node(msgspec.Struct, frozen=True):
    """An object. ``kind``: its type. ``children``: their types by name."""

    kind: str
    children: Mapping[str, str] = {}


def add_qom_commands(commands: CommandTable, board: Board, hotplug: Hotplug) -> None:
    """Add the commands to the table."""

    def qom_list(_context: CommandContext, arguments: QomList) -> object:
        node = _node(board, hotplug, arguments.path)
        children = [
            {"name": name, "type": f"child<{kind}>"} for name, kind in node.children.items()
        ]
        return [{"name": "type", "type": "string"}, *children]

    def qom_get(_context: CommandContext, arguments: QomGet) -> object:
        node = _node(board, hotplug, arguments.path)
        if arguments.property == "type":
            return node.kind
        if arguments.property in node.children:
            return f"{arguments.path.rstrip('/')}/{arguments.property}"
        raise QmpError(f"Property '{node.kind}.{arguments.property}' not found")

    commands.add("qom-list", qom_list, arguments=QomList)
    commands.add("qom-get", qom_get, arguments=QomGet)


def _node(board: Board, hotplug: Hotplug, path: str) -> _Node:
    machine = f"{board.machine_type}-machine"
    backends = {name: backend.kind for name, backend in hotplug.backends.items()}
    nodes = {
        "/": _Node("container", {"machine": machine, "objects": "container"}),
        "/machine": _Node(machine, {"peripheral": "container", "peripheral-anon": "container"}),
        "/machine/peripheral": _Node("container", hotplug.devices),
        "/machine/peripheral-anon": _Node("container"),
        "/objects": _Node("container", backends),
    }
    for parent in ("/machine/peripheral", "/objects"):
        for name, kind in nodes[parent].children.items():
            nodes[f"{parent}/{name}"] = _Node(kind)
    node = nodes.get(path.rstrip("/") or "/")
    if node is None:
        raise QmpError(f"Device '{path}' not found", "DeviceNotFound")
    return node
