"""A VM's drives as its monitor shows them now: which can be captured, which cannot, and why.

Sources: QEMU ``qapi/block-core.json`` (query-block, x-debug-query-block-graph, query-block-jobs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from stillframe.machine.process.inspection import ask
from stillframe.machine.process.vm_info import reachable_path
from stillframe.machine.qemu.drive_names import device_id
from stillframe.machine.qemu.live_rest import THROTTLE_LIMITS
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_int, as_list, as_map

OURS = "still."
"""The prefix of all our job and node names. Short: QEMU reads a transaction's names byte by byte,
in the stop."""
_FILTERS = frozenset({"throttle", "copy-on-read", "compress", "blkdebug", "blklogwrites"})
_LOCAL = frozenset({"file", "host_device"})
_FLASH = "flash"


class Drive(msgspec.Struct, frozen=True, kw_only=True):
    """A drive with a medium that the guest may write.

    ``label``: the user's name for it. ``node``: the node that an action on the whole drive names.
    ``format_node``: the node below filters, which an overlay goes on. ``file_node``: the node below
    that, empty if there is none. ``layers``: the images from the top down, (format, file name).
    ``plain``: QEMU opened them without options that their names do not show (such as an offset).
    ``file``: the top image's path as this process can open it, or None.
    """

    label: str
    device: str
    qdev: str
    node: str
    format_node: str
    file_node: str
    driver: str
    protocol: str
    filename: str
    file: str | None
    layers: tuple[tuple[str, str], ...]
    plain: bool
    virtual_size_bytes: int
    actual_size_bytes: int
    direct: bool
    no_flush: bool
    encrypted: bool
    temporary: bool
    throttled: bool

    @property
    def is_flash(self) -> bool:
        """Whether it holds firmware variables: small, and in RAM as well."""
        return _FLASH in self.device or _FLASH in self.qdev

    @property
    def luks(self) -> bool:
        """Whether it is ciphertext of a fixed layout, which can be copied as it is.

        An encrypted qcow2 grows, and QEMU (7.2 to 10.0) aborts at a write beyond the end of a node
        that is being copied (``util/hbitmap.c``: hbitmap_set).
        """
        return self.driver == "luks"

    @property
    def only_plain(self) -> bool:
        """Whether it is encrypted and a copy could only hold its plain text."""
        return self.encrypted and not (self.luks and self.file is not None)


def writable_drives(qmp: QmpClient, pid: int) -> tuple[Drive, ...]:
    """Return the drives that the guest may write; empty and read-only ones are left out.

    Raises:
        MachineError: the monitor went away.
    """
    nodes = {
        str(as_map(node).get("node-name")): as_map(node)
        for node in as_list(qmp.execute("query-named-block-nodes"))
    }
    below = _children(qmp)
    found = []
    for entry in map(as_map, as_list(qmp.execute("query-block"))):
        medium = as_map(entry.get("inserted"))
        if medium and medium.get("ro") is not True:
            found.append(_drive(entry, medium, nodes, below, Path(f"/proc/{pid}")))
    return tuple(found)


def _children(qmp: QmpClient) -> dict[str, dict[str, str]]:
    """Return each node's children, by the name of the edge."""
    # The x- prefix means unstable, but QEMU has had it since 4.0. Without it, every disk can still
    # be copied.
    graph = as_map(ask(qmp, "x-debug-query-block-graph"))
    names = {as_map(n).get("id"): str(as_map(n).get("name")) for n in as_list(graph.get("nodes"))}
    found: dict[str, dict[str, str]] = {}
    for edge in map(as_map, as_list(graph.get("edges"))):
        parent = names.get(edge.get("parent"), "")
        found.setdefault(parent, {})[str(edge.get("name"))] = names.get(edge.get("child"), "")
    return found


def _drive(
    entry: Mapping[str, object],
    medium: Mapping[str, object],
    nodes: Mapping[str, Mapping[str, object]],
    below: Mapping[str, Mapping[str, str]],
    process: Path,
) -> Drive:
    device, qdev = str(entry.get("device") or ""), str(entry.get("qdev") or "")
    node = top = str(medium.get("node-name"))
    filters = []
    while str(nodes.get(top, medium).get("drv")) in _FILTERS:
        filters.append(str(nodes.get(top, medium).get("drv")))
        top = below.get(top, {}).get("file") or below.get(top, {}).get("image") or ""
        if not top:
            top = node
            break
    info = nodes.get(top, medium)
    image = as_map(info.get("image"))
    file_node = below.get(top, {}).get("file", "")
    filename = plain_name(str(image.get("filename") or info.get("file") or ""))
    limited = any(medium.get(key) for key in THROTTLE_LIMITS)
    protocol = str(nodes.get(file_node, {}).get("drv") or info.get("drv"))
    cache = as_map(info.get("cache"))
    layers = tuple(_layers(image, info))
    return Drive(
        label=device if device and not device.startswith("#") else device_id(qdev) or node,
        device=device,
        qdev=qdev,
        node=node,
        format_node=top,
        file_node=file_node,
        driver=str(info.get("drv")),
        protocol=protocol,
        filename=filename,
        file=reachable_path(process, filename)
        if protocol in _LOCAL and not filename.startswith("json:")
        else None,
        layers=tuple((kind, plain_name(name)) for kind, name in layers),
        plain=not any(name.startswith("json:") for _, name in layers),
        virtual_size_bytes=as_int(image.get("virtual-size")),
        actual_size_bytes=as_int(image.get("actual-size")),
        direct=cache.get("direct") is True,
        no_flush=cache.get("no-flush") is True,
        encrypted=info.get("encrypted") is True or "encrypt" in str(image.get("format-specific")),
        temporary="/vl." in filename and file_is_gone(process, filename),
        throttled=limited or "throttle" in filters,
    )


def _layers(image: Mapping[str, object], info: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    yield str(image.get("format") or info.get("drv")), str(image.get("filename"))
    backing = as_map(image.get("backing-image"))
    name = image.get("full-backing-filename") or image.get("backing-filename")
    if backing:
        yield from _layers(backing, {})
    elif name:
        yield str(image.get("backing-filename-format") or ""), str(name)


def plain_name(name: str) -> str:
    """Return the file's name; QEMU uses the ``json:`` form where options were given."""
    if not name.startswith("json:"):
        return name
    try:
        file = as_map(msgspec.json.decode(name.removeprefix("json:")))
    except msgspec.DecodeError:
        return name
    while isinstance(file.get("file"), Mapping):
        file = as_map(file["file"])
    return str(file.get("filename") or file.get("file.filename") or name)


def file_is_gone(process: Path, filename: str) -> bool:
    """Return whether an image has no name any more."""
    reachable = reachable_path(process, filename)
    return reachable is None or not Path(reachable).exists()


def own_name(token: str, number: int) -> str:
    """Return the name of a job or node for a disk of one take; ``token``: see
    ``folding.new_token``."""
    return f"{OURS}{token[-4:]}{number}"


def foreign_jobs(qmp: QmpClient) -> list[tuple[str, str]]:
    """Return (id, type) of block jobs of other programs that rule out a point in time.

    Another backup is no obstacle (QEMU ``block/backup.c`` takes no operation blocker).
    """
    jobs = [as_map(job) for job in as_list(ask(qmp, "query-block-jobs"))]
    return [
        (str(job.get("device")), str(job.get("type")))
        for job in jobs
        if not str(job.get("device")).startswith(OURS)
        and job.get("type") != "backup"
        and job.get("status") not in ("concluded", "null")
    ]
