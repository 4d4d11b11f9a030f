"""Disks given by ``-drive`` and its short forms: written to an overlay, never to the disk itself.

Sources: QEMU ``blockdev.c`` (drive_new), ``softmmu/vl.c`` (drive options).
"""

from __future__ import annotations

import os
import re

from stillframe.restore.disk_use import is_written
from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue
from stillframe.restore.records import DiskOverlay

OVERLAY_REASON = "so that the first VM's disk is not written"
OWN_DISK = "give the disk yourself after --, with the same id"

_URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
SHORT_FORMS = {
    "": "index=0,media=disk",
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "mtdblock": "if=mtd",
    "pflash": "if=pflash",
    "sd": "if=sd",
}
_PLAIN_WORDS = """
file format driver snapshot id if index bus unit media readonly read-only auto-read-only cache aio
werror rerror discard detect-zeroes copy-on-read serial group force-share locking
l2-cache-size cache-size refcount-cache-size cache-clean-interval lazy-refcounts
"""
_PLAIN_KEYS = frozenset(_PLAIN_WORDS.split())
_SHARE = "backing.force-share"
_LOCATION = ("file", "format", "driver", "snapshot")


def short_disk(draft: Draft, option: Option) -> None:
    """``-hda FILE`` and its like, and a bare file name."""
    value = OptionValue(SHORT_FORMS[option.name], "file")
    value.set("file", option.value)
    _drive(draft, option, value)


def cdrom(draft: Draft, option: Option) -> None:
    """``-cdrom``: read only."""
    draft.read_file(option.value, option)
    draft.keep(option)


def drive(draft: Draft, option: Option) -> None:
    """``-drive``."""
    _drive(draft, option, OptionValue(option.value, "file"))


def snapshot(draft: Draft, option: Option) -> None:
    """``-snapshot``: what the first VM wrote is in a temporary file without a name."""
    draft.drop(option, "every disk has an overlay of its own")
    draft.note("the first VM ran with -snapshot: what it wrote to its disks is lost")


def _drive(draft: Draft, option: Option, value: OptionValue) -> None:
    shared = value.is_on(_SHARE)  # an overlay of an earlier restore
    value.drop(_SHARE)
    file, driver = _location(value)
    record = draft.disk_record(value.get("id"))
    image_format = value.get("format") or driver
    if record is not None and record.filename != file and not _same(draft, record.filename, file):
        reason = f"the VM had {record.filename or 'no medium'} there at the instant"
        draft.note(f"{option.text}: {reason}")
        file = record.filename
        image_format = record.driver if file else ""
    elif record is not None and not image_format:
        image_format = record.driver
    if _is_elsewhere(draft, option, value, file):
        return
    if not file:
        value.drop(*_LOCATION)
        draft.replace(option, ("-drive", value.text), "the drive was empty")
    elif value.get("media") == "cdrom" or value.is_on("readonly") or value.is_on("read-only"):
        if is_remote(file):
            draft.touch("network", "connect", file, option)
        else:
            draft.read_file(file, option)
        value.set("file", file)
        draft.replace(option, (option.words[0], value.text), "its medium was changed")
    else:
        value.drop("file", "driver", "snapshot", "format")
        overlay, in_use = add_overlay(draft, option, file, image_format)
        value.set("file", overlay)
        value.set("format", "qcow2")
        if in_use or shared:
            value.set(_SHARE, True)
        draft.replace(option, ("-drive", value.text), OVERLAY_REASON)


def _location(value: OptionValue) -> tuple[str, str]:
    """(file, format), from ``file=`` or ``file.filename=``."""
    driver = value.get("driver")
    if value.get("file").startswith("file:"):
        value.set("file", value.get("file").removeprefix("file:"))
    if value.get("file.filename") and value.get("file.driver", "file") in ("file", "host_device"):
        file = value.get("file.filename")
        value.drop("file.filename", "file.driver", "file.locking", "file.aio")
        return file, driver
    return value.get("file"), driver


def _is_elsewhere(draft: Draft, option: Option, value: OptionValue, file: str) -> bool:
    odd = sorted(name for name in value.names() if not _is_plain(name))
    if odd:
        draft.refuse(option, f"it describes the image by {', '.join(odd)}", OWN_DISK)
    elif value.get("driver") and not file:
        draft.refuse(option, "it names no image file", OWN_DISK)
    elif "/dev/fdset/" in file:
        draft.refuse(option, "the first VM was given its disk as a file descriptor", OWN_DISK)
    elif file.startswith("fat:") and "rw:" in file:
        draft.refuse(option, "it writes to a directory of the host", OWN_DISK)
    else:
        return False
    return True


def _is_plain(key: str) -> bool:
    """Whether a key of ``-drive`` says nothing of where the image is."""
    return key in _PLAIN_KEYS or key.startswith(("throttling.", "cache.", "bps", "iops"))


def add_overlay(draft: Draft, option: Option, file: str, image_format: str) -> tuple[str, bool]:
    """Plan an overlay over a disk; (its path, whether the disk is in use now)."""
    base = file if is_remote(file) else draft.resolve(file)
    overlay = str(draft.places.disks / f"disk{len(draft.overlays)}.qcow2")
    in_use = not is_remote(file) and is_written(base)
    draft.overlays.append(
        DiskOverlay(base=base, base_format=image_format, overlay=overlay, in_use=in_use)
    )
    if is_remote(file):
        draft.touch("network", "connect", file, option)
    else:
        draft.read_file(base, option)
    draft.touch("file", "create", overlay, option)
    draft.note("disks are as they are now, not as they were at the snapshot's instant")
    if in_use:
        draft.note(
            f"{base} is being written by another program: the restored VM sees those writes, and"
            " its file systems may break; restore it while the first VM is off, or copy the disk"
        )
    return overlay, in_use


def is_remote(file: str) -> bool:
    """Whether a file name is a URL or a protocol of QEMU's."""
    return bool(_URL.match(file))


def _same(draft: Draft, one: str, other: str) -> bool:
    return bool(one and other) and os.path.realpath(draft.resolve(one)) == os.path.realpath(
        draft.resolve(other)
    )
