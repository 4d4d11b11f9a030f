"""Disks given by ``-blockdev``: a qcow2 overlay takes the node's name, the nodes below it are
opened read-only.

Source: QEMU ``qapi/block-core.json`` (BlockdevOptions).
"""

from __future__ import annotations

import json

import msgspec

from stillframe.restore.disk_use import is_written
from stillframe.restore.disks import OVERLAY_REASON, OWN_DISK, add_overlay, is_remote
from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue

_FORMATS = frozenset({"raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx"})
_FILTERS = frozenset({"throttle", "copy-on-read", "preallocate"})
_FILES = frozenset({"file", "host_device"})
_WITHOUT_DISK = frozenset({"null-co", "null-aio"})
_LAYOUT_KEYS = ("offset", "size", "backing.driver")


class _Node(msgspec.Struct, frozen=True, kw_only=True):
    option: Option
    value: OptionValue
    name: str


def blockdev(draft: Draft, option: Option) -> None:
    """``-blockdev``."""
    nodes = _nodes(draft)
    value = OptionValue(option.value, "driver")
    name = value.get("node-name")
    roots = [node for node in nodes.values() if not _users(nodes, node.name)]
    above = [root for root in roots if name in _reachable(nodes, root.name)]
    if not any(_is_written_root(root) for root in above):
        _read_only_medium(draft, option, value)
        return
    image = _image(nodes, name)
    if any(root.name == name for root in above):
        _replace_root(draft, option, value, image)
        return
    value.drop("auto-read-only")
    value.set("read-only", True)
    if image is not None and is_written(draft.resolve(image[0])):
        value.set("force-share", True)
    draft.replace(option, (option.words[0], value.text), "an overlay takes the writes")


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
    base = f"stillframe-base-{len(draft.overlays)}"
    value.set("node-name", base)
    value.drop("auto-read-only")
    value.set("read-only", True)
    if in_use:
        value.set("force-share", True)
    top = {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": overlay},
        "backing": base,
    }
    words = (option.words[0], value.text, "-blockdev", json.dumps(top, separators=(",", ":")))
    draft.replace(option, words, OVERLAY_REASON)


def _read_only_medium(draft: Draft, option: Option, value: OptionValue) -> None:
    for key, text in value.items():
        if key.rpartition(".")[2] == "filename":
            draft.read_file(text, option)
    draft.scan(option, value, known=("node-name", "filename", "file.filename"))
    draft.keep(option)


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


def _reachable(nodes: dict[str, _Node], name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += _children(nodes, current)
    return seen


def _is_written_root(node: _Node) -> bool:
    value = node.value
    if value.get("driver") in _WITHOUT_DISK:
        return False
    return not value.is_on("read-only")


def _image(nodes: dict[str, _Node], name: str) -> tuple[str, str] | None:
    """(file, format) of the image that a node shows, if it is a plain one in a file."""
    image_format = "raw"
    for _ in range(len(nodes) + 1):
        node = nodes.get(name)
        if node is None or node.value.keys() & set(_LAYOUT_KEYS):
            return None
        driver = node.value.get("driver")
        if driver in _FILES:
            return node.value.get("filename"), image_format
        if driver in _FORMATS:
            image_format = driver
        elif driver not in _FILTERS:
            return None
        inline = node.value.get("file.filename")
        if inline:
            plain = node.value.get("file.driver") in _FILES
            return (inline, image_format) if plain else None
        name = node.value.get("file")
    return None
