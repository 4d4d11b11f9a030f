"""Disks given by ``-blockdev``: a qcow2 overlay takes the node's name, the nodes below it are
opened read-only.

Source: QEMU ``qapi/block-core.json`` (BlockdevOptions).
"""

from __future__ import annotations

import itertools
import json

import msgspec

from stillframe.restore.disk_use import is_written
from stillframe.restore.disks import OVERLAY_REASON, OWN_DISK, add_overlay, is_remote
from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue

_FORMATS = frozenset({"raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx"})
_FILES = frozenset({"file", "host_device"})
_WITHOUT_DISK = frozenset({"null-co", "null-aio"})
_NETWORK_WORDS = "nbd ssh http https ftp ftps iscsi nfs rbd gluster"
_NETWORK = frozenset(_NETWORK_WORDS.split())
_LAYOUT_KEYS = ("offset", "size", "backing.driver")


class _Node(msgspec.Struct, frozen=True, kw_only=True):
    option: Option
    value: OptionValue
    name: str


def blockdev(draft: Draft, option: Option) -> None:
    """``-blockdev``. Whatever the nodes are to each other, all recorded ones are read-only."""
    nodes = _nodes(draft)
    value = OptionValue(option.value, "driver")
    name = value.get("node-name")
    read_only = value.is_on("read-only")
    if value.get("driver") in _WITHOUT_DISK:
        draft.keep(option)
    elif not read_only and (name in _attached(draft) or not _users(nodes, name)):
        _replace_root(draft, option, value, _image(nodes, name))
    else:
        _list_files(draft, option, value)
        image = _image(nodes, name)
        if not read_only:
            _make_read_only(value, in_use=image is not None and is_written(draft.resolve(image[0])))
        draft.replace(option, (option.words[0], value.text), "an overlay takes the writes")


def _make_read_only(value: OptionValue, *, in_use: bool) -> None:
    value.drop("auto-read-only")
    value.set("read-only", True)
    if in_use:
        value.set("force-share", True)


def _replace_root(
    draft: Draft, option: Option, value: OptionValue, image: tuple[str, str] | None
) -> None:
    name = value.get("node-name")
    if image is None or not name:
        draft.refuse(option, "Stillframe cannot put an overlay on such a disk", OWN_DISK)
        return
    file, image_format = image
    record = draft.disk_record(name)
    shown = record.filename if record is not None else ""
    if shown and not is_remote(shown) and draft.resolve(shown) != draft.resolve(file):
        draft.refuse(option, f"the VM's disk had become {shown}", OWN_DISK)
        return
    overlay, in_use = add_overlay(draft, option, file, image_format)
    taken = _nodes(draft)
    numbers = itertools.count(len(draft.overlays))
    base = next(n for number in numbers if (n := f"stillframe-base-{number}") not in taken)
    value.set("node-name", base)
    _make_read_only(value, in_use=in_use)
    top = {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": overlay},
        "backing": base,
    }
    words = (option.words[0], value.text, "-blockdev", json.dumps(top, separators=(",", ":")))
    draft.replace(option, words, OVERLAY_REASON)


def _list_files(draft: Draft, option: Option, value: OptionValue) -> None:
    names = [key for key in value.names() if key.rpartition(".")[2] == "filename"]
    for key in names:
        draft.read_file(value.get(key), option)
    if value.get("driver") in _NETWORK:
        draft.touch("network", "connect", option.value, option)
    draft.scan(option, value, known=("node-name", *names))


def _attached(draft: Draft) -> set[str]:
    """Nodes and drives that a device is given."""
    devices = [o for o in draft.recorded if o.name == "device"]
    return {OptionValue(option.value, "driver").get("drive") for option in devices}


def _nodes(draft: Draft) -> dict[str, _Node]:
    found = {}
    for option in draft.recorded:
        if option.name == "blockdev":
            value = OptionValue(option.value, "driver")
            name = value.get("node-name")
            found[name] = _Node(option=option, value=value, name=name)
    return found


def _children(nodes: dict[str, _Node], name: str) -> list[str]:
    node = nodes.get(name)
    if node is None:
        return []
    return [t for k, t in node.value.items() if k != "node-name" and t != name and t in nodes]


def _users(nodes: dict[str, _Node], name: str) -> list[str]:
    return [other for other in nodes if name in _children(nodes, other)]


def _image(nodes: dict[str, _Node], name: str) -> tuple[str, str] | None:
    """(file, format) of the image that a node shows, if it is a plain one in a file."""
    image_format = "raw"
    for _ in range(len(nodes) + 1):
        node = nodes.get(name)
        if node is None or node.value.names() & set(_LAYOUT_KEYS):
            return None
        driver = node.value.get("driver")
        if driver in _FILES:
            return node.value.get("filename"), image_format
        if driver in _FORMATS:
            image_format = driver
        elif driver != "throttle":
            return None
        inline = node.value.get("file.filename")
        if inline:
            plain = node.value.get("file.driver") in _FILES
            return (inline, image_format) if plain else None
        name = node.value.get("file")
    return None
