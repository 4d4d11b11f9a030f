"""The devices of a running QEMU, from its object tree, and the options that recreate them.

Sources: QEMU ``qapi/qom.json``, ``qapi/qdev.json``; ``softmmu/qdev-monitor.c`` (qdev_set_id: the
devices' places in the tree, and the numbers of those without an id).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from stillframe.machine.process.inspection import ask
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_CONTAINER = "/machine/peripheral"
_NUMBERED = re.compile(r"device\[(\d+)\]")
_USB = re.compile(r"Device \S+, Port ([\d.]+),.*?, ID: (.+)")
_CPU_WORDS = """
socket-id die-id cluster-id core-id thread-id module-id book-id drawer-id node-id
"""
_CPU_KEYS = frozenset(_CPU_WORDS.split())
_PLACES = ("bus", "addr", "scsi-id", "channel", "lun", "port", "unit", "nr", "slot")
"""Properties that say where a device is; QEMU chooses those that are absent."""
_TEXTS = frozenset({"str", "string"})
_ALWAYS = frozenset({"romfile"})
"""An empty value differs from none."""
_MADE_BY_BOARD = frozenset({"busnr", "hotplugged", "failover_pair_id", "bootindex"})


class LiveDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a user asked for. ``id``: empty if it has none; ``number``: then its position
    among all such devices. ``bus``: the name of the bus that it is on, ``bus_path`` its QOM
    path."""

    path: str
    kind: str
    id: str
    number: int
    bus: str
    bus_path: str


def read_devices(qmp: QmpClient) -> list[LiveDevice]:
    """Return all devices of ``-device`` and ``device_add``; each one after the owner of its bus.

    Raises:
        MachineError: the monitor went away.
    """
    found = [
        _device(qmp, container, str(as_map(item).get("name")), str(as_map(item).get("type")))
        for container in (_CONTAINER, f"{_CONTAINER}-anon")
        for item in as_list(ask(qmp, "qom-list", {"path": container}))
        if str(as_map(item).get("type")).startswith("child<")
    ]
    ordered: list[LiveDevice] = []
    for _ in range(len(found)):  # each round takes those whose bus exists by now
        waiting = {f"{device.path}/" for device in found if device not in ordered}
        ready = [
            device
            for device in found
            if device not in ordered and not device.bus_path.startswith(tuple(waiting))
        ]
        ordered += sorted(ready, key=lambda device: device.number)
    return ordered


def _device(qmp: QmpClient, container: str, name: str, kind: str) -> LiveDevice:
    path = f"{container}/{name}"
    bus_path = str(ask(qmp, "qom-get", {"path": path, "property": "parent_bus"}) or "")
    number = _NUMBERED.fullmatch(name)
    anonymous = container != _CONTAINER
    return LiveDevice(
        path=path,
        kind=kind[6:-1],
        id="" if anonymous else name,
        number=int(number[1]) if anonymous and number else 0,
        bus=bus_path.rpartition("/")[2],
        bus_path=bus_path,
    )


class DeviceOptions:
    """The options that would create a device as it is now."""

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp
        self._properties: dict[str, list[Mapping[str, object]]] = {}
        self._known: dict[str, frozenset[str]] = {}
        self._usb_ports: dict[str, str] | None = None

    def all(self, device: LiveDevice) -> dict[str, object]:
        """Return everything that differs from the defaults of its kind, and its place.

        Raises:
            MachineError: the monitor went away.
        """
        fields: dict[str, object] = {"driver": device.kind}
        if device.id:
            fields["id"] = device.id
        fields |= self.place(device)
        for found in self._of_kind(device.kind):
            name, kind = str(found.get("name")), str(found.get("type"))
            if name in _PLACES or name in _MADE_BY_BOARD or name.startswith("x-"):
                continue
            if device.kind.endswith("-cpu") and name not in _CPU_KEYS:
                continue  # the features of all processors are those of -cpu
            value = self._value(device, name)
            if "default-value" in found:
                wanted = value is not None and value != found["default-value"]
            elif kind.startswith("link<"):
                value = str(value or "").removeprefix("/objects/")
                wanted = bool(value) and "/" not in value
            else:
                wanted = kind in _TEXTS and (bool(value) or name in _ALWAYS)
            if wanted and isinstance(value, str | int | float | bool):
                fields[name] = value
        return fields

    def place(self, device: LiveDevice) -> dict[str, object]:
        """Return the device's place: its bus, and its address there.

        Raises:
            MachineError: the monitor went away.
        """
        fields: dict[str, object] = {"bus": device.bus} if device.bus else {}
        for name in _PLACES[1:]:
            value = self._address(device, name)
            if value not in (None, "", -1):
                fields[name] = value
        return fields

    def _address(self, device: LiveDevice, name: str) -> object:
        names = self._names(device)
        value = self._value(device, name) if name in names else None
        if name == "addr" and "multifunction" in names and isinstance(value, int):
            return f"{value >> 3:x}.{value & 7}"  # PCI: slot and function
        if name == "port" and not value and device.kind.startswith("usb-"):
            return self._usb_port(device.id)
        return value

    def has(self, device: LiveDevice, key: str) -> bool:
        """Return whether the device has that property.

        Raises:
            MachineError: the monitor went away.
        """
        return key in self._names(device)

    def text(self, device: LiveDevice, key: str) -> str:
        """Return one property in the form that an option would give it.

        Raises:
            MachineError: the monitor went away.
        """
        if key == "bus":
            return device.bus
        value = self._address(device, key)
        return "" if value is None else str(value).removeprefix("/objects/")

    def _names(self, device: LiveDevice) -> frozenset[str]:
        if device.path not in self._known:
            found = as_list(ask(self._qmp, "qom-list", {"path": device.path}))
            self._known[device.path] = frozenset(str(as_map(item).get("name")) for item in found)
        return self._known[device.path]

    def _of_kind(self, kind: str) -> list[Mapping[str, object]]:
        if kind not in self._properties:
            found = as_list(ask(self._qmp, "device-list-properties", {"typename": kind}))
            self._properties[kind] = [as_map(item) for item in found]
        return self._properties[kind]

    def _value(self, device: LiveDevice, name: str) -> object:
        return ask(self._qmp, "qom-get", {"path": device.path, "property": name})

    def _usb_port(self, identity: str) -> str:
        if self._usb_ports is None:
            self._usb_ports = {
                match[2].strip(): match[1] for match in _USB.finditer(self._qmp.hmp("info usb"))
            }
        return self._usb_ports.get(identity, "") if identity else ""
