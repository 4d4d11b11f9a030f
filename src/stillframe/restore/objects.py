"""``-object``, ``-device`` and other options that may tie the VM to the host.

Sources: QEMU ``qapi/qom.json``, ``backends/hostmem-file.c``, ``hw/virtio/vhost-vsock.c``.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path

from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue

_OWN = "give that option yourself after --, with the same id"
_SHARED_FILE_KEYS = (
    "mem-path",
    "pmem",
    "align",
    "discard-data",
    "readonly",
    "rom",
    "offset",
)
_REFUSED_OBJECTS = {
    "cryptodev-vhost-user": "a part of it is in another process",
    "memory-backend-epc": "enclave memory cannot be restored",
    "sev-guest": "encrypted memory cannot be restored",
    "sev-snp-guest": "encrypted memory cannot be restored",
    "tdx-guest": "encrypted memory cannot be restored",
    "dbus-vmstate": "a part of the state is in other processes",
    "x-remote-object": "a part of it is in another process",
    "x-vfio-user-server": "a part of it is in another process",
    "iommufd": "it is for devices of the host",
    "pr-manager-helper": "it needs the first VM's helper process",
}
_KNOWN_WORDS = """
iothread throttle-group main-loop thread-context rng-random rng-builtin rng-egd
secret secret_keyring tls-creds-anon tls-creds-psk tls-creds-x509 tls-cipher-suites
authz-simple authz-list authz-list-file authz-pam
memory-backend-ram memory-backend-memfd memory-backend-file memory-backend-shm
filter-buffer filter-mirror filter-redirector filter-rewriter filter-replay colo-compare
cryptodev-backend-builtin cryptodev-backend-lkcf can-bus acpi-generic-initiator acpi-generic-port
"""
_KNOWN_OBJECTS = frozenset(_KNOWN_WORDS.split())
_HOST_INPUT = ("input-linux", "input-barrier")
_REFUSED_DEVICES = {
    "vfio-": "the first VM has the device, and its state cannot be restored",
    "vhost-user-": "a part of it is in another process",
    "vhost-vdpa": "the first VM has the device",
    "vhost-scsi": "a part of it is in the kernel",
    "usb-host": "the first VM has the device, and its state cannot be restored",
    "usb-redir": "it is connected to a device elsewhere",
    "x-pci-proxy-dev": "a part of it is in another process",
    "virtio-input-host": "it takes an input device of the host",
    "scsi-generic": "the guest commands a device of the host directly",
    "scsi-block": "the guest commands a disk of the host directly",
    "u2f-passthru": "it is tied to a device of the host",
    "ivshmem-doorbell": "it shares memory with other processes",
}
_HUGETLBFS_MAGIC = 0x958458F6
_FIRST_CID = 1 << 16


def qom_object(draft: Draft, option: Option) -> None:
    """``-object``."""
    value = OptionValue(option.value, "qom-type")
    kind = value.get("qom-type")
    refused = _REFUSED_OBJECTS.get(kind)
    if refused is not None:
        draft.refuse(option, refused, _OWN)
    elif kind in _HOST_INPUT:
        draft.drop(option, "it takes the keyboard and mouse of the host")
    elif kind == "memory-backend-file" and value.get("share") in ("on", "yes", "true", "y"):
        _shared_memory_file(draft, option, value)
    elif kind == "filter-dump":
        value.set("file", draft.private_file(value.get("id") or "dump", option))
        draft.replace(option, (option.words[0], value.text), "the first VM writes that file")
    else:
        if kind not in _KNOWN_OBJECTS:
            draft.risk(option, "Stillframe does not know what it does")
        if kind.startswith("tls-creds"):
            draft.read_file(value.get("dir"), option)
        if value.get("mem-path"):
            draft.touch("file", "write", draft.resolve(value.get("mem-path")), option)
        draft.scan(option, value, known=("id", "dir", "mem-path"))
        draft.keep(option)


def _shared_memory_file(draft: Draft, option: Option, value: OptionValue) -> None:
    """RAM on a shared file: the same amount on a nameless one, under the same id.

    The stream fills it, so the file's content is not wanted.
    """
    path = draft.resolve(value.get("mem-path"))
    huge_bytes = _huge_page_bytes(path)
    value.drop(*_SHARED_FILE_KEYS)
    value.set("qom-type", "memory-backend-memfd")
    value.set("share", True)
    reason = f"{path} is the first VM's own memory; a nameless file instead"
    if huge_bytes:
        value.set("hugetlb", True)
        value.set("hugetlbsize", huge_bytes)
        reason += f", on {huge_bytes >> 10} KiB pages as before"
    draft.replace(option, (option.words[0], value.text), reason)


class _Statfs(ctypes.Structure):
    _fields_ = (
        ("f_type", ctypes.c_long),
        ("f_bsize", ctypes.c_long),
        ("rest", ctypes.c_long * 14),
    )


def _huge_page_bytes(path: str) -> int:
    """The page size, if a file or directory is on hugetlbfs (statfs(2)), else 0."""
    found = _Statfs()
    libc = ctypes.CDLL(None, use_errno=True)
    for place in (Path(path), Path(path).parent):
        if libc.statfs(os.fsencode(place), ctypes.byref(found)) == 0:
            return found.f_bsize if found.f_type == _HUGETLBFS_MAGIC else 0
    return 0


def device(draft: Draft, option: Option) -> None:
    """``-device``."""
    value = OptionValue(option.value, "driver")
    driver = value.get("driver")
    for prefix, reason in _REFUSED_DEVICES.items():
        if driver.startswith(prefix):
            draft.refuse(option, reason, _OWN)
            return
    if driver.startswith("vhost-vsock"):
        cid = str(_FIRST_CID + secrets.randbelow(1 << 30))
        value.set("guest-cid", cid)
        draft.touch("device", "write", "/dev/vhost-vsock", option)
        draft.replace(option, (option.words[0], value.text), "the first VM has the context id")
        return
    if driver == "usb-mtp":
        draft.touch("file", "write", draft.resolve(value.get("rootdir")), option)
        draft.risk(option, "the guest can read and may write a directory of the host")
    dropped = value.drop("pcap")
    draft.scan(option, value, known=("id", "bus", "rootdir", "mac", "serial", "label"))
    if dropped:
        draft.replace(option, (option.words[0], value.text), "the first VM writes that file")
    else:
        draft.keep(option)


def device_default(draft: Draft, option: Option) -> None:
    """``-global``: what ``-device`` may say, for all devices of a kind."""
    value = OptionValue(option.value, "driver")
    driver = value.get("driver") or next(iter(value.names()), "").partition(".")[0]
    named = {key.rpartition(".")[2] for key in value.names()} | {value.get("property")}
    if "pcap" in named:
        draft.refuse(option, "it writes to a file of the host", "leave it out")
        return
    if named & {"drive", "chardev", "netdev"}:
        draft.risk(option, f"it ties every {driver} to something of the host")
    draft.scan(option, value, known=("driver", "property"))
    draft.keep(option)


def memory_path(draft: Draft, option: Option) -> None:
    """``-mem-path``: a directory for nameless files, or a file that is mapped privately."""
    draft.touch("file", "write", draft.resolve(option.value), option)
    draft.keep(option)


def shared_directory(draft: Draft, option: Option) -> None:
    """``-fsdev`` and ``-virtfs``."""
    value = OptionValue(option.value, "fsdriver")
    kind = value.get("fsdriver")
    if kind == "proxy":
        draft.refuse(option, "it needs the first VM's helper process", _OWN)
        return
    if kind == "local":
        path = draft.resolve(value.get("path"))
        if value.is_on("readonly"):
            draft.touch("file", "read", path, option)
        else:
            draft.touch("file", "write", path, option)
            draft.risk(option, f"the guest can change what is in {path}")
    draft.keep(option)


def usb_device(draft: Draft, option: Option) -> None:
    """``-usbdevice``."""
    if option.value in ("tablet", "mouse", "keyboard", "wacom-tablet", "ccid"):
        draft.keep(option)
    else:
        draft.refuse(option, "it is tied to a device of the host", "use -device after --")


def tpm(draft: Draft, option: Option) -> None:
    """``-tpmdev``: the TPM is another process, or the host's own."""
    draft.refuse(
        option,
        "the TPM and its state are not in the VM",
        "start another swtpm, and give -chardev and -tpmdev with the same ids after --",
    )
