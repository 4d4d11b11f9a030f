"""``-object``: what is known of each type. Source: QEMU ``qapi/qom.json``."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from stillframe.restore.builder import UNKNOWN, Builder
from stillframe.restore.memory import AT_ONCE, memory_file
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_REFUSED = {
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
_HOST_INPUT = ("input-linux", "input-barrier")
_MEMORY = "policy prealloc-context"
_FILTER = "netdev queue status position insert indev outdev vnet_hdr_support"
_TLS = "endpoint priority username passwordid"
_PLAIN = {
    "iothread": "",
    "throttle-group": "",
    "main-loop": "",
    "thread-context": "cpu-affinity node-affinity",
    "rng-random": "",
    "rng-builtin": "",
    "rng-egd": "chardev",
    "secret": "data format keyid iv",
    "tls-creds-anon": _TLS,
    "tls-creds-psk": _TLS,
    "tls-creds-x509": _TLS,
    "tls-cipher-suites": "priority",
    "authz-simple": "identity",
    "authz-list": "policy rules.match rules.policy rules.format",
    "authz-list-file": "",
    "memory-backend-ram": _MEMORY,
    "memory-backend-memfd": _MEMORY,
    "memory-backend-shm": _MEMORY,
    "filter-buffer": _FILTER,
    "filter-mirror": _FILTER,
    "filter-redirector": _FILTER,
    "filter-rewriter": _FILTER,
    "filter-replay": f"{_FILTER} rr",
    "colo-compare": "primary_in secondary_in outdev iothread notify_dev",
    "cryptodev-backend-builtin": "",
    "cryptodev-backend": "",
    "can-bus": "",
    "acpi-generic-initiator": "pci-dev",
    "acpi-generic-port": "pci-bus",
}
"""Keys with texts that name nothing on the host."""
_FILES = {"rng-random": "filename", "secret": "file", "authz-list-file": "filename"}
_TLS_DIRECTORY = "dir"
_KEY_BYTES = 32


def qom_object(builder: Builder, option: Option) -> None:
    """``-object``."""
    value = option.parsed()
    kind = value.get("qom-type")
    if value.is_on("prealloc"):
        builder.risk(option, AT_ONCE)
    if kind in _REFUSED:
        builder.refuse(option, _REFUSED[kind])
    elif kind in _HOST_INPUT:
        builder.drop(option, "it takes the keyboard and mouse of the host")
    elif kind == "memory-backend-file":
        memory_file(builder, option, value)
        builder.judge(option, value, plain=("qom-type", "id", *_MEMORY.split()))
    elif kind == "filter-dump":
        value.set("file", builder.private_file(value.get("id") or "dump", option))
        builder.judge(option, value, plain=("qom-type", "id", "file", *_FILTER.split()))
        builder.set_value(option, value, "the first VM writes that file")
    elif kind == "secret" and _is_lost_master_key(builder, value):
        value.drop("file")
        value.set("format", "base64")
        value.set("data", _random_key())
        builder.note("libvirt's master key went with the domain: another one, which opens nothing")
        builder.set_value(option, value, "libvirt removes the key's file with the domain")
    else:
        if kind not in _PLAIN:
            builder.risk(option, UNKNOWN)
        plain = ("qom-type", "id", *_PLAIN.get(kind, "").split())
        files = (_FILES.get(kind, _TLS_DIRECTORY if kind.startswith("tls-creds") else ""),)
        builder.judge(option, value, plain=plain, files=files)
        builder.keep(option)


def _is_lost_master_key(builder: Builder, value: OptionValue) -> bool:
    """Whether the secret is a domain's ``master-key.aes``, gone and replaceable. It decrypts the
    secrets that libvirt gives by monitor, and goes when the domain ends. If a secret of the command
    line needs it, nothing replaces it."""
    path = Path(builder.resolve(value.get("file")))
    used = any(
        option.parsed().get("keyid") == value.get("id")
        for option in builder.recorded
        if option.name == "object"
    )
    return path.name == "master-key.aes" and not os.path.exists(path) and not used  # noqa: PTH110


def _random_key() -> str:
    return "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(_KEY_BYTES))
