"""Disks given by ``-drive`` and its short forms: writes go to an overlay, never to the disk itself.

Sources: QEMU ``blockdev.c`` (drive_new), ``system/vl.c`` (drive options).
"""

from __future__ import annotations

import os

from stillframe.restore.block_nodes import Image, UnknownNode, nested
from stillframe.restore.blockdevs import node_reader, touch_image
from stillframe.restore.builder import Builder
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

OVERLAY_REASON = "so that the first VM's disk is not written"
SHORT_FORMS = {
    "": "index=0,media=disk",
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "cdrom": "index=2,media=cdrom",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "mtdblock": "if=mtd",
    "pflash": "if=pflash",
    "sd": "if=sd",
}
_DRIVE_WORDS = """
snapshot id if index bus unit media readonly read-only cache aio werror rerror discard detect-zeroes
copy-on-read serial group addr iops iops_rd iops_wr bps bps_rd bps_wr iops_size
throttling auto-read-only locking cyls heads secs trans
"""
_DRIVE_KEYS = frozenset(_DRIVE_WORDS.split())
"""Keys of the drive and its device, not of the image."""
_SHARE = "backing.force-share"


def snapshot(builder: Builder, option: Option) -> None:
    """``-snapshot``: what the first VM wrote is in a temporary file without a name."""
    builder.drop(option, "every disk has an overlay of its own")
    if not len(builder.captured):
        builder.note("the first VM ran with -snapshot: what it wrote to its disks is lost")


def drive(builder: Builder, option: Option) -> None:
    """``-drive``, ``-hda FILE`` and the like, and a bare file name."""
    value = as_drive(option)
    shared = value.is_on(_SHARE)  # an overlay of an earlier restore
    value.drop(_SHARE)
    pairs = [(k, t) for k, t in value.items() if not _is_of_drive(k)]
    file = value.get("file")
    name = value.get("id") or builder.drive_names.get(id(option), "")
    read_only = value.get("media") == "cdrom" or any(map(value.is_on, ("readonly", "read-only")))
    try:
        tree = nested(("driver" if k == "format" else k, t) for k, t in pairs if k != "file")
        if not file and not tree:
            image = None
        else:
            image = node_reader(builder).drive_image(tree, file)
        files = image.files if image is not None and not read_only else ()
        captured = builder.captured.find(name, files=files)
        if captured is None:
            image = _of_the_instant(builder, option, name, value, image)
    except UnknownNode as unknown:
        image, captured = None, builder.captured.find(name)
        if captured is None:
            builder.risk(option, str(unknown))
            builder.refuse(option, str(unknown))
            return
    if captured is not None:
        image = captured.image(image)
    for key in {key.split(".")[0] for key, _ in pairs}:
        value.drop(key)
    value.drop("snapshot")
    if image is None:
        builder.replace(option, ("-drive", value.text), "the drive was empty")
        return
    if captured is None:
        touch_image(builder, option, image)
    if image.nothing:
        builder.keep(option)
    elif read_only:
        value.drop("copy-on-read")
        if image.format:
            value.set("format", image.format)
        value.set("file", image.base)
        if set(value.items()) == set(as_drive(option).items()):
            builder.keep(option)
        else:
            builder.replace(option, ("-drive", value.text), "its image as it was at the instant")
    else:
        value.drop("auto-read-only", "locking")
        overlay = builder.replace_disk(
            image.base,
            image.format,
            files=image.files,
            kind="overlay",
            option=option,
            captured=captured,
        )
        value.set("file", overlay.overlay)
        value.set("format", "qcow2")
        # In use, and of the instant: the VM that is being forked writes to it until then.
        if overlay.in_use or (captured is None and shared):
            value.set(_SHARE, True)
        reason = OVERLAY_REASON if captured is None else f"disk {captured.label} of the instant"
        builder.replace(option, ("-drive", value.text), reason)


def as_drive(option: Option) -> OptionValue:
    """Return the value of the ``-drive`` that a short form stands for."""
    if option.name == "drive":
        return OptionValue(option.value, "file", json=False)
    value = OptionValue(SHORT_FORMS[option.name], "file", json=False)
    value.set("file", option.value)
    return value


def _is_of_drive(key: str) -> bool:
    return key.split(".")[0] in _DRIVE_KEYS


def _of_the_instant(
    builder: Builder, option: Option, name: str, value: OptionValue, image: Image | None
) -> Image | None:
    """Return the image that the VM had at the instant, as far as the monitor told."""
    record = builder.disk_record(name)
    temporary = value.is_on("snapshot") or any(o.name == "snapshot" for o in builder.recorded)
    if record is None or (temporary and record.filename):
        return image
    if not record.filename:
        if image is not None:
            builder.note(f"{option.text}: the VM had no medium there at the instant")
        return None
    node = node_reader(builder).from_filename(record.filename)
    if image is not None and (_same(image, record.filename) or not isinstance(node, dict)):
        known = image.format or not isinstance(node, dict)
        format_ = image.format if known else record.driver
        return Image(base=image.base, format=format_, files=image.files, remotes=image.remotes,
                     nothing=image.nothing, tree=image.tree | {"driver": format_})  # fmt: skip
    if isinstance(node, dict) and node.get("driver") != "file":
        return image
    builder.note(f"{option.text}: the VM had {record.filename} there at the instant")
    return node_reader(builder).drive_image({"driver": record.driver}, record.filename)


def _same(image: Image, filename: str) -> bool:
    return filename == image.base or any(
        os.path.realpath(file) == os.path.realpath(filename) for file in image.files
    )
