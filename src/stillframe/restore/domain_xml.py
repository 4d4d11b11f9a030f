"""A recorded domain XML, rewritten so that the new domain shares nothing with the old one, and what
it still names on the host (libvirt ``docs/formatdomain.rst``)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from stillframe.errors import RefusedError
from stillframe.restore.block_nodes import NodeReader, UnknownNode
from stillframe.restore.captured_disks import CapturedBase, CapturedDisks
from stillframe.restore.ledger import Ledger

_NEVER_SHARED = ("hostdev", "filesystem", "shmem", "tpm", "vsock", "smartcard")
"""Devices tied to the host or to other processes."""
_SOCKETS = ("serial", "console", "parallel", "channel")
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_NETWORK_WORDS = ("network", "bridge", "dev", "portgroup", "pool", "volume", "name", "host",
                  "service", "address", "port")  # fmt: skip
_FILE_WORDS = ("file", "dir", "path")
"""Relative paths too, whatever libvirt makes of them."""
_OF_THE_OLD_DISK = ("backingStore", "mirror", "shareable", "transient", "auth", "encryption")
_WITH_COPY = "take it with --disks copy, or restore it while the first domain is off"


def own_devices(root: Element, live: Element, ledger: Ledger, captured: CapturedDisks) -> None:
    """Give the domain its own disks, sockets, ports and MAC addresses.

    Args:
        live: the XML of the domain as it ran, which has the device ids.

    Raises:
        RefusedError: a device cannot exist twice, or a disk is being written to.
    """
    _own_nvram(root, live, ledger, captured)
    devices = root.find("devices")
    for element in list(devices if devices is not None else ()):
        if element.tag in _NEVER_SHARED or element.get("type") in ("hostdev", "vhostuser", "vdpa"):
            raise _refused(
                f"the domain has a <{element.tag}> device",
                "it is tied to the host or to another process, and cannot be had twice",
                "detach it before the snapshot is taken, or restore it with --as qemu",
            )
        if element.tag == "disk":
            _own_disk(element, live, ledger, captured)
        elif element.tag == "interface":
            _new_mac(element, ledger)
        elif element.tag == "graphics":
            _own_display(element)
        elif element.tag in _SOCKETS:
            _own_line(element, ledger)
        for log in element.findall("log"):
            element.remove(log)


def own_disks(root: Element, live: Element, ledger: Ledger, captured: CapturedDisks) -> None:
    """As ``own_devices``, for disks alone: the same domain keeps all else.

    Raises:
        RefusedError: a disk is not in the snapshot, or it is encrypted.
    """
    for disk in root.iterfind("devices/disk"):
        if is_writable(disk) and captured_disk(disk, live, captured) is None:
            raise not_captured(disk)
        _own_disk(disk, live, ledger, captured)


def not_captured(disk: Element) -> RefusedError:
    """Return the error for a domain that goes back to its old memory without an old disk."""
    return _refused(
        f"disk {target_of(disk)} is not in the snapshot",
        "the memory of then and the disk of now do not belong together",
        "take the snapshot with --disks copy",
    )


def is_writable(disk: Element) -> bool:
    """Whether a ``<disk>`` has a medium that the guest may write to."""
    return disk.find("source") is not None and disk.find("readonly") is None


def target_of(disk: Element) -> str:
    """Return a ``<disk>``'s name in the guest, such as ``vda``."""
    target = disk.find("target")
    return (target.get("dev") if target is not None else None) or "disk"


def captured_disk(disk: Element, live: Element, captured: CapturedDisks) -> CapturedBase | None:
    """Return the snapshot's disk for a ``<disk>``. ``live``: the XML with the device ids."""
    alias = f"devices/disk/target[@dev='{target_of(disk)}']/../alias"
    return _captured(captured, live, alias, file_of(disk))


def file_of(disk: Element) -> str | None:
    """Return the file or block device of a ``<disk>``, or None."""
    source = disk.find("source")
    return (source.get("file") or source.get("dev")) if source is not None else None


def put_image(disk: Element, file: str, image_format: str) -> None:
    """Make ``file`` the image of a ``<disk>``."""
    source, driver = disk.find("source"), disk.find("driver")
    if source is None:
        source = SubElement(disk, "source")
    if driver is None:
        driver = SubElement(disk, "driver", {"name": "qemu"})
    source.clear()
    source.set("file", file)
    disk.set("type", "file")
    driver.set("type", image_format)
    for part in [part for part in disk if part.tag in _OF_THE_OLD_DISK]:
        disk.remove(part)


def note_touches(root: Element, ledger: Ledger) -> None:
    """Note all that the XML still names on the host: every path, network, address and program."""
    for element in root.iter():
        where = f"<{element.tag.replace(_QEMU, 'qemu:')}>"
        if element.tag == f"{_QEMU}commandline":
            ledger.risk(where, "it gives QEMU options past libvirt")
        texts = [*element.attrib.items(), ("", (element.text or "").strip())]
        for key, text in texts:
            if text.startswith("/") and element.tag != "target":
                program = element.tag in ("emulator", "script")
                ledger.touch("program" if program else "file", "run" if program else "read",
                             text, where)  # fmt: skip
            elif element.tag == "source" and key in _FILE_WORDS:
                ledger.touch("file", "read", text, where)
            elif element.tag == "source" and key in _NETWORK_WORDS:
                ledger.touch("network", "connect", f"{key} {text}", where)
            elif element.tag == "audio" and key == "type" and text not in ("none", "spice"):
                ledger.touch("device", "write", f"the host's sound, by {text}", where)
            elif element.tag in ("input", "output") and key in ("dev", "name"):
                ledger.risk(where, f"Stillframe does not know what {key}={text} does")
            elif element.tag == "graphics" and key == "listen":
                ledger.touch("network", "listen", text, where)
            elif element.tag in ("host", "address") and key == "name":
                ledger.touch("network", "connect", text, where)
            elif element.tag == "listen" and key in ("address", "network"):
                ledger.touch("network", "listen", text, where)


def _own_disk(disk: Element, live: Element, ledger: Ledger, captured: CapturedDisks) -> None:
    """Put an overlay over a writable disk: over that of the instant, if the snapshot has it."""
    if not is_writable(disk):
        _touch_headers(disk, ledger)
        return
    name, base, driver = target_of(disk), file_of(disk), disk.find("driver")
    found = captured_disk(disk, live, captured)
    if found is not None and found.backing_format != "luks":
        base, base_format = found.backing, found.backing_format
    elif found is not None or base is None or _is_encrypted(disk):
        raise _refused(
            f"an overlay over disk {name} cannot be described to libvirt",
            "it is encrypted, or no file or block device",
            "restore it with --as qemu",
        )
    else:
        base_format = driver.get("type", "raw") if driver is not None else "raw"
        _touch_headers(disk, ledger)
    overlay = ledger.replace_disk(
        base, base_format, files=(base,), kind="overlay", option=f"<disk> {name}", captured=found
    )
    if found is None:
        ledger.touch("file", "read", base, f"<disk> {name}", required=True)
    if overlay.in_use:
        raise _refused(f"disk {name} ({base}) is being written to", "the guest's memory and that"
                       " disk do not belong together any more", _WITH_COPY)  # fmt: skip
    put_image(disk, overlay.overlay, "qcow2")


def _touch_headers(disk: Element, ledger: Ledger) -> None:
    """Note what the headers of a disk's image files name."""
    source, driver = disk.find("source"), disk.find("driver")
    file = source.get("file") or source.get("dev") if source is not None else None
    if not file:
        return
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    node = {"driver": image_format, "file": {"driver": "file", "filename": file}}
    try:
        ledger.touch_headers(NodeReader({}, str).image(node), f"<disk> {file}")
    except UnknownNode as unknown:
        ledger.risk(f"<disk> {file}", str(unknown))


def _is_encrypted(disk: Element) -> bool:
    return disk.find("encryption") is not None or disk.find("source/encryption") is not None


def _captured(
    captured: CapturedDisks, live: Element, alias_path: str, file: str | None
) -> CapturedBase | None:
    alias = live.find(alias_path)
    name = alias.get("name", "") if alias is not None else alias_path
    return captured.find(name, devices=[name], files=[file] if file else [])


def _own_nvram(root: Element, live: Element, ledger: Ledger, captured: CapturedDisks) -> None:
    """Plan a copy of UEFI's variables: their content is in the stream, only the length counts."""
    nvram = root.find("os/nvram")
    source = nvram.find("source") if nvram is not None else None
    if nvram is None:
        return
    path = (nvram.text or "").strip() or (source.get("file", "") if source is not None else "")
    captured.find("<nvram>", files=[path])
    copy = ledger.replace_disk(
        path, nvram.get("format", "raw"), files=(), kind="copy", option="<nvram>"
    )
    ledger.touch("file", "read", path, "<nvram>", required=True)
    if source is not None:
        source.set("file", copy.overlay)
    else:
        nvram.text = copy.overlay


def _new_mac(interface: Element, ledger: Ledger) -> None:
    mac, target = interface.find("mac"), interface.find("target")
    if mac is not None:
        mac.set("address", "52:54:00:" + ":".join(f"{b:02x}" for b in secrets.token_bytes(3)))
        ledger.note(
            "the network card has a new MAC address; the guest still uses the old one until it"
            " looks again (its driver keeps what it read at boot)"
        )
    if target is not None:
        interface.remove(target)


def _own_display(graphics: Element) -> None:
    if graphics.get("port"):
        graphics.set("autoport", "yes")
        graphics.set("port", "-1")
    for element in (graphics, *_sockets_of(graphics)):
        element.attrib.pop("socket", None)  # libvirt chooses one


def _sockets_of(graphics: Element) -> Iterator[Element]:
    yield from graphics.iterfind("listen")


def _own_line(line: Element, ledger: Ledger) -> None:
    """Give a serial line or channel its own end; libvirt makes what pty, spicevmc etc. need."""
    source = line.find("source")
    if source is None:
        return
    kind, path = line.get("type"), source.get("path")
    if source.get("mode") == "connect" or kind in ("dev", "udp"):
        there = path or source.get("host") or kind
        raise _refused(
            f"a <{line.tag}> is connected to {there}",
            "whatever is at its other end is the first domain's",
            "use a socket that QEMU listens on",
        )
    if path and line.tag == "channel":
        source.attrib.pop("path")  # libvirt chooses one
    elif path and kind in ("unix", "file", "pipe"):
        own = str(ledger.places.run / f"{line.tag}-{Path(path).name}")
        source.set("path", own)
        ledger.touch("socket" if kind == "unix" else "file", "create", own, f"<{line.tag}>")
        ledger.note(f"{line.tag}: {own}")
    elif kind == "pty":
        source.attrib.pop("path", None)
    elif kind == "tcp":
        source.set("service", "0")


def _refused(what: str, why: str, remedy: str) -> RefusedError:
    return RefusedError(what, why=why, remedy=remedy, guest_state="none")
