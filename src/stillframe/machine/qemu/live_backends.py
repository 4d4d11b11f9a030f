"""The backends of a running QEMU (net, character devices, objects), and options that recreate them.

Sources: QEMU ``net/net.c`` (print_net_client: only text describes them), ``chardev/char.c``,
``qapi/qom.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from stillframe.machine.process.inspection import ask
from stillframe.machine.qemu.options import Option, made
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_NET = re.compile(r"^(?: \\ )?(\S+): index=\d+,type=([\w-]+)(?:,(.*))?$", re.MULTILINE)
_HUB = re.compile(r"^hub (\d+)\n((?: \\ .*\n?)*)", re.MULTILINE)
_PORT = re.compile(r"^ \\ (\S+?)(?:: (.*))?$", re.MULTILINE)
"""A port of a hub, and the client plugged into it (QEMU ``net/hub.c``: net_hub_info)."""
_NET_KEYS = {"user": ("net", "restrict"), "tap": ("ifname",), "hubport": ("hubid",)}
_REFERENCES = {
    "netdev": ("netdev",),
    "chardev": ("chardev", "outdev", "indev"),
    "object": ("memdev", "iothread", "rng", "cryptodev", "hostmem", "throttle-group", "authz"),
}
"""Keys by which a device names a backend of each kind."""
_MEMORY_WORDS = """
size share mem-path hugetlb hugetlbsize prealloc policy host-nodes reserve readonly rom pmem
align offset discard-data seal
"""
_MEMORY_KEYS = frozenset(_MEMORY_WORDS.split())
_OUT_OF_DATE = frozenset({"type", "opened", "loaded"})


class Backends:
    """The existing backends of each kind, by id; ``nics``: the number of network cards."""

    def __init__(self, qmp: QmpClient) -> None:
        """Query the backends.

        Raises:
            MachineError: the monitor went away.
        """
        self._qmp = qmp
        text = qmp.hmp("info network").replace("\r", "")
        ports = [
            (name, "hubport", f"hubid={hub}")
            for hub, lines in _HUB.findall(text)
            for name, _ in _PORT.findall(lines)
        ]
        plugged = _HUB.sub(lambda hub: "\n".join(p for _, p in _PORT.findall(hub[2])) + "\n", text)
        networks = [*ports, *_NET.findall(plugged)]
        self._nets = {name: (kind, keys) for name, kind, keys in networks if kind != "nic"}
        self.nics = len({name for name, kind, _ in networks if kind == "nic"})
        self._kinds = {"chardev": self._children("/chardevs"), "object": self._children("/objects")}

    def _children(self, path: str) -> dict[str, str]:
        items = [as_map(item) for item in as_list(ask(self._qmp, "qom-list", {"path": path}))]
        children = {str(item.get("name")): str(item.get("type")) for item in items}
        return {name: kind[6:-1] for name, kind in children.items() if kind.startswith("child<")}

    def has(self, option: Option) -> bool:
        """Return whether the backend of a recorded option still exists; True if that is unknown."""
        if option.name == "netdev":
            return option.identity in self._nets or not option.identity
        live = self._kinds.get(option.name)
        return not live or option.identity in live

    def needed(self, option: Option) -> list[tuple[str, str]]:
        """Return (kind, id) of each backend that an option names."""
        fields = option.fields()
        return [
            (kind, fields[key])
            for kind, keys in _REFERENCES.items()
            for key in keys
            if fields.get(key)
        ]

    def option(self, kind: str, identity: str) -> Option | None:
        """Return the option that recreates a backend; None if it is gone, or cannot be
        described."""
        if kind == "netdev":
            return self._net(identity)
        found = self._kinds[kind].get(identity)
        if found is None:
            return None
        if kind == "chardev":
            backend = found.removeprefix("chardev-")
            # The restored VM never reuses the original's file or address
            # (docs/reference/restore.md).
            place = {"file": {"path": "/dev/null"}, "socket": {"path": f"{identity}.sock"}}
            return made("chardev", {"backend": backend, "id": identity} | place.get(backend, {}))
        return self._object(identity, found)

    def _net(self, identity: str) -> Option | None:
        if identity not in self._nets:
            return None
        kind, text = self._nets[identity]
        told = dict(part.partition("=")[::2] for part in text.split(","))
        keys = {key: told[key] for key in _NET_KEYS.get(kind, ()) if told.get(key)}
        if kind == "user" and "net" in keys:
            keys["net"] += "/24"
        return made("netdev", {"type": kind, "id": identity} | keys)

    def _object(self, identity: str, kind: str) -> Option:
        fields: dict[str, object] = {"qom-type": kind, "id": identity}
        told = as_list(ask(self._qmp, "qom-list", {"path": f"/objects/{identity}"}))
        for name, type_ in ((str(as_map(t).get("name")), str(as_map(t).get("type"))) for t in told):
            if name in _OUT_OF_DATE or name.startswith("x-") or type_.startswith("child<"):
                continue
            if kind.startswith("memory-backend") and name not in _MEMORY_KEYS:
                continue
            path = {"path": f"/objects/{identity}", "property": name}
            value = ask(self._qmp, "qom-get", path)
            if isinstance(value, str):
                value = value.removeprefix("/objects/")
            if value not in (None, "", [], 0, "default") or value is False:
                if isinstance(value, list):
                    fields |= {f"{name}.{index}": item for index, item in enumerate(value)}
                elif isinstance(value, str | int | bool):
                    fields[name] = value
        return made("object", fields)


def missing(backends: Backends, line: Iterable[Option], of: Iterable[Option]) -> list[Option]:
    """Return the backends that the options ``of`` need and ``line`` does not make, in the order of
    need."""
    there = {(option.name, option.identity) for option in line}
    found: list[Option] = []
    waiting = list(of)
    while waiting:
        for key in backends.needed(waiting.pop()):
            option = None if key in there else backends.option(*key)
            if option is not None:
                there.add(key)
                found.insert(0, option)
                waiting.append(option)
    return found
