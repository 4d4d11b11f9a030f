"""Disks given by ``-blockdev``: a qcow2 overlay takes the node's name, and the nodes below it are
opened read-only.

Source: QEMU ``qapi/block-core.json`` (BlockdevOptions).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from stillframe.restore.block_nodes import Image, NodeReader, Tree, UnknownNode, nested
from stillframe.restore.builder import Builder
from stillframe.restore.captured_disks import CapturedBase
from stillframe.restore.disk_use import is_written
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_ON = ("on", "yes", "true", "y")
_CHILD_KEYS = ("file", "backing", "data-file")
_DEPTH = 32
_REASON = "so that the first VM's disk is not written"


def node_reader(builder: Builder) -> NodeReader:
    """Return a reader of trees that may name the recorded nodes."""
    return NodeReader(_named(builder), builder.resolve)


def touch_image(builder: Builder, option: Option, image: Image) -> None:
    """Note where on the host, or beyond it, an image is."""
    seen = {touch.target for touch in builder.touches}
    for file in image.files:
        if file not in seen:  # otherwise the node below has noted it
            builder.read_file(file, option)
    for remote in image.remotes:
        builder.touch("network", "connect", remote, option)
    builder.touch_headers(image, option)


def blockdev(builder: Builder, option: Option) -> None:
    """Handle ``-blockdev``. All recorded nodes become read-only, however they are related."""
    value = option.parsed()
    try:
        tree = _tree(option)
        if _is_left_over(builder, tree):
            builder.drop(option, "nothing uses it any more")
            return
        if _is_below_captured(builder, tree.get("node-name", ""), _DEPTH):
            builder.drop(option, "the disk of the instant takes its place")
            return
        captured = _captured(builder, tree)
        if captured is not None:
            _lay_on_captured(builder, option, tree, captured)
            return
        reader = node_reader(builder)
        image = reader.image(tree)
        if image.nothing:
            builder.keep(option)
            return
        touch_image(builder, option, image)
        written = _written_nodes(builder, tree)
        overlays = [(path, name, reader.image(node)) for path, name, node in written]
        became = [reason for _, name, node in overlays if (reason := _became(builder, name, node))]
        if became:
            builder.refuse(option, became[0])
            return
    except UnknownNode as unknown:
        builder.risk(option, str(unknown))
        builder.refuse(option, str(unknown))
        return
    tops: list[str] = []
    for path, name, inner in overlays:
        overlay = builder.replace_disk(
            inner.base, inner.format, files=inner.files, kind="overlay", option=option
        )
        base = _free_name(builder, len(builder.overlays))
        value.set(f"{path}node-name", base)
        image_file = {"driver": "file", "filename": overlay.overlay}
        top = {"driver": "qcow2", "node-name": name, "file": image_file, "backing": base}
        tops += ["-blockdev", json.dumps(top, separators=(",", ":"))]
    _make_read_only(value, tree, in_use=any(map(is_written, image.files)))
    reason = _REASON if tops else "an overlay takes the writes"
    builder.replace(option, (*option.with_value(value.text), *tops), reason)


def _lay_on_captured(builder: Builder, option: Option, tree: Tree, captured: CapturedBase) -> None:
    """Make the node an overlay over the disk of the instant; nothing of the old node stays."""
    image = captured.image(_readable(builder, tree))
    overlay = builder.replace_disk(
        image.base,
        image.format,
        files=image.files,
        kind="overlay",
        option=option,
        captured=captured,
    )
    image_file = {"driver": "file", "filename": overlay.overlay}
    top: dict[str, object] = {
        "driver": "qcow2", "node-name": tree["node-name"], "file": image_file,
    }  # fmt: skip
    if overlay.in_use:  # the VM that is being forked writes to it until the instant
        top["backing"] = _shared(captured)
    words = ("-blockdev", json.dumps(top, separators=(",", ":")))
    builder.replace(option, words, f"disk {captured.label} of the instant")


def _shared(captured: CapturedBase) -> Tree:
    """Return its top image, opened without locks, as are those that its header names below it."""
    kind = "host_device" if Path(captured.backing).is_block_device() else "file"
    file = {"driver": kind, "filename": captured.backing}
    return {
        "driver": captured.backing_format, "file": file, "read-only": True, "force-share": True,
    }  # fmt: skip


def _captured(builder: Builder, tree: Tree) -> CapturedBase | None:
    """Return the disk of the instant for a node that the guest writes to."""
    name = tree.get("node-name", "")
    if not name or not len(builder.captured) or tree.get("read-only") in _ON:
        return None
    if name not in _attached(builder) and _users(builder, name):
        return None
    image = _readable(builder, tree)
    options = (*builder.recorded, *builder.own)
    devices = [o.parsed() for o in options if o.name == "device"]
    return builder.captured.find(
        name,
        devices=[device.get("id") for device in devices if device.get("drive") == name],
        files=image.files if image is not None else (),
    )


def _is_below_captured(builder: Builder, name: str, depth: int) -> bool:
    """Whether only disks that the snapshot holds lie on a node."""
    if not name or name in _attached(builder) or not len(builder.captured) or not depth:
        return False
    trees = _named(builder).items()
    parents = [(parent, tree) for parent, tree in trees if name in _children(tree)]
    return bool(parents) and all(
        _captured(builder, tree) is not None or _is_below_captured(builder, parent, depth - 1)
        for parent, tree in parents
    )


def _children(tree: Tree) -> set[str]:
    """Return the names of the nodes that a node refers to, at any depth."""
    found = {tree[key] for key in _CHILD_KEYS if isinstance(tree.get(key), str)}
    for child in tree.values():
        if isinstance(child, dict):
            found |= _children(child)
    return found


def _readable(builder: Builder, tree: Tree) -> Image | None:
    try:
        return node_reader(builder).image(tree)
    except UnknownNode:
        return None


def _make_read_only(value: OptionValue, tree: Tree, *, in_use: bool, path: str = "") -> None:
    """Make the node and all nodes in it read-only."""
    if tree.get("driver") == "copy-on-read":  # it would write what it reads
        value.set(f"{path}driver", "raw")
        value.drop(f"{path}bottom")
    if tree.get("read-only") not in _ON and (not path or "read-only" in tree):
        value.drop(f"{path}auto-read-only")
        value.set(f"{path}read-only", True)
    if "auto-read-only" in tree and path:
        value.drop(f"{path}auto-read-only")
    if in_use and tree.get("force-share") not in _ON:
        value.set(f"{path}force-share", True)
    for key, child in tree.items():
        if isinstance(child, dict) and "driver" in child:
            _make_read_only(value, child, in_use=in_use, path=f"{path}{key}.")


def _written_nodes(builder: Builder, tree: Tree, path: str = "") -> list[tuple[str, str, Tree]]:
    """Return (path, name, tree) of the nodes that an overlay must replace."""
    name = tree.get("node-name", "")
    attached = name in _attached(builder)
    is_root = not path and not _users(builder, name)
    found = []
    if (attached or is_root) and tree.get("read-only") not in _ON:
        if not name:
            raise UnknownNode("the disk has no name")
        found.append((path, name, tree))
    for key, child in tree.items():
        if isinstance(child, dict):
            found += _written_nodes(builder, child, f"{path}{key}.")
    return found


def _became(builder: Builder, name: str, image: Image) -> str:
    """Return why the recorded disk is not that of the instant; empty if it is."""
    record = builder.disk_record(name)
    shown = record.filename if record is not None else ""
    if not shown.startswith("/") or shown in map(builder.resolve, image.files):
        return ""
    return f"the VM's disk had become {shown}"


def _is_left_over(builder: Builder, tree: Tree) -> bool:
    """Whether the node was used only by nodes that the caller replaced."""
    name = tree.get("node-name", "")
    mentioned = any(name in texts for texts in _texts(builder.replaced, "blockdev"))
    return bool(mentioned) and name not in _attached(builder) and not _users(builder, name)


def _free_name(builder: Builder, start: int) -> str:
    taken = _named(builder)
    names = (f"stillframe-base-{number}" for number in itertools.count(start))
    return next(name for name in names if name not in taken)


def _tree(option: Option) -> Tree:
    if option.value.startswith("{") and any("." in key for key in json.loads(option.value)):
        raise UnknownNode("its keys are not as QEMU takes them")
    return nested(option.parsed().items())


def _named(builder: Builder) -> dict[str, Tree]:
    """Return all recorded nodes, at any depth, by name."""
    if builder.nodes is None:
        builder.nodes = {}
        for option in builder.recorded:
            if option.name == "blockdev":
                try:
                    _collect(_tree(option), builder.nodes)
                except UnknownNode:
                    continue
    return builder.nodes


def _collect(tree: Tree, into: dict[str, Tree]) -> None:
    if tree.get("node-name"):
        into[tree["node-name"]] = tree
    for child in tree.values():
        if isinstance(child, dict):
            _collect(child, into)


def _attached(builder: Builder) -> set[str]:
    """Return the nodes and drives that devices use."""
    options = (*builder.recorded, *builder.own)
    devices = [o.parsed().get("drive") for o in options if o.name == "device"]
    pflash = [t for o in options if o.name in ("machine", "M")
              for k, t in o.parsed().items() if k.startswith("pflash")]  # fmt: skip
    return {name for name in (*devices, *pflash) if name}


def _users(builder: Builder, name: str) -> bool:
    """Whether another node is on it."""
    return any(name in texts for texts in _texts(builder.recorded, "blockdev", but=name))


def _texts(options: tuple[Option, ...], name: str, but: str = "") -> list[set[str]]:
    """Return, for each option, the texts that may name other nodes."""
    found = []
    for option in options:
        if option.name == name:
            items = list(option.parsed().items())
            if ("node-name", but) not in items:
                found.append(
                    {t for k, t in items if k.split(".")[-1] in ("file", "backing", "data-file")}
                )
    return found
