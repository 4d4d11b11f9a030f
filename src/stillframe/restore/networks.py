"""Network backends: no port, interface or program of the first VM is used again.

Sources: QEMU ``qapi/net.json``, ``net/tap.c``, ``net/hub.c``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from stillframe.restore.builder import OWN, Builder
from stillframe.restore.forwarded_ports import parse_forward
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue, escape_commas
from stillframe.restore.show import printable

_VHOST = Path("/dev/vhost-net")
_FIRST_HUB = 1000
_DEFAULT_KIND = {"nic": "user"}  # net/net.c, net_param_nic
_ELSEWHERE = frozenset({"vhost-user", "vhost-vdpa"})
NIC_KEYS = ("model", "mac", "macaddr", "addr", "name", "vectors")
"""Keys of ``-nic`` and ``-net nic`` that the guest sees."""
_USER_WORDS = """
type id net host restrict ipv4 ipv6 ipv6-net ipv6-prefix ipv6-prefixlen ipv6-host dhcpstart dns
ipv6-dns dnssearch dnssearch.str domainname hostname tftp-server-name bootfile guestfwd guestfwd.str
"""
_USER_KEYS = frozenset({*_USER_WORDS.split(), *NIC_KEYS})
_TAP_KEYS = frozenset({"type", "id", "script", "downscript", "sndbuf", *NIC_KEYS})
_ALONE = "connected to nothing now, since two VMs with one address must not meet on one network"


def network(builder: Builder, option: Option) -> None:
    """``-netdev``, ``-nic`` and ``-net``."""
    value = option.parsed()
    kind = value.get("type") or _DEFAULT_KIND.get(option.name, "")
    if kind in _ELSEWHERE:
        builder.refuse(option, "a part of the network card is in another process")
    elif kind == "user":
        _user(builder, option, value)
    elif kind in ("tap", "bridge") and (kind == "tap" or _is_virtio(builder, option, value)):
        _tap(builder, option, value)
    elif kind in ("hubport", "nic", "none", ""):
        builder.judge(option, value, plain=("type", "id", "netdev", *NIC_KEYS))
        builder.keep(option)
    else:
        _isolated(builder, option, value)


def shared_networks(options: Sequence[Option]) -> list[str]:
    """Return a new command line's networks on which guests may meet: only a caller gives those."""
    found = []
    for option in options:
        if option.name not in ("netdev", "nic", "net"):
            continue
        value = option.parsed()
        kind = value.get("type") or _DEFAULT_KIND.get(option.name, "")
        alone = kind == "tap" and not value.get("ifname") and not value.get("fd")
        if kind not in ("user", "hubport", "nic", "none", "") and not alone:
            found.append(value.get("id") or kind)
    return found


def default_network(builder: Builder) -> None:
    """Note the network card that QEMU adds by itself (``net/net.c``, net_init_clients)."""
    names = {option.name for option in (*builder.recorded, *builder.own)}
    if not names & {"nodefaults", "net", "nic", "netdev"}:
        _guest_reaches(builder, "QEMU's default network card")


def _guest_reaches(builder: Builder, option: Option | str) -> None:
    builder.touch(
        "network", "connect", "whatever the guest asks for", option,
        reason="the guest reaches this host's network, and services on its loopback address",
    )  # fmt: skip


def _user(builder: Builder, option: Option, value: OptionValue) -> None:
    reasons = []
    texts = [text for key, text in value.items() if key.partition(".")[0] == "hostfwd"]
    if value.drop("hostfwd"):
        reasons.append("the first VM has the forwarded ports")
        forwards = [parse_forward(value.get("id"), text) for text in texts]
        if not builder.moves_ports:
            builder.note("no port is forwarded: give the network with hostfwd= after --")
        for forward, text in zip(forwards if builder.moves_ports else [], texts, strict=False):
            if forward is None:
                builder.note(f"{printable(text)} is not forwarded: there is no other place for it")
                continue
            value.append("hostfwd", forward.rule)
            builder.forwards.append(forward)
            address = forward.address or "any address"
            builder.touch(
                "network",
                "listen",
                f"a free {forward.protocol} port of {address}",
                option,
                reason=f"whoever reaches {address} reaches the guest's port {forward.guest_port}",
            )
    if value.drop("smb", "smbserver"):
        reasons.append("smb= would start smbd")
    targets = [t for k, t in value.items() if k.split(".")[0] == "guestfwd"]
    for target in targets:
        address = target.partition("-")[2]
        if address.startswith("cmd:"):
            builder.touch("program", "run", target, option)
        else:
            builder.touch("network", "connect", target, option)
    if not value.is_on("restrict"):
        _guest_reaches(builder, option)
    builder.judge(option, value, plain=_USER_KEYS, files=("tftp",), host=("tftp",))
    builder.set_value(option, value, ", ".join(reasons))


def _tap(builder: Builder, option: Option, value: OptionValue) -> None:
    """Replace it with a tap of its own. Only a tap offers vnet_hdr; without that, the state of a
    virtio card that was on a tap does not load."""
    if builder.unprivileged:
        builder.refuse(
            option,
            "it needs a new tap interface, which takes CAP_NET_ADMIN",
            f"restore as root, or {OWN}, with the same id",
        )
        return
    fds = value.get("fds") or value.get("vhostfds")
    queues = value.get("queues") or (str(fds.count(":") + 1) if ":" in fds else "")
    if value.drop("vhostfd", "vhostfds") and not value.get("vhost"):
        value.set("vhost", True)
    value.drop("ifname", "helper", "br", "fd", "fds", "queues")
    if queues:
        is_number = re.fullmatch(r"\d{1,9}", queues, re.ASCII)
        value.set("queues", int(queues) if is_number else queues)
    value.set("type", "tap")
    value.set("script", "no")
    value.set("downscript", "no")
    if value.is_on("vhost") and not _VHOST.exists():
        value.set("vhost", False)  # QEMU 7.2 would abort; the guest does not see the difference
    if value.is_on("vhost"):
        builder.touch("device", "write", "/dev/vhost-net", option)
    builder.touch("network", "create", "a new tap interface, connected to nothing", option)
    builder.judge(option, value, plain=_TAP_KEYS)
    builder.set_value(option, value, f"a tap interface of its own, {_ALONE}; no script is run")


def _is_virtio(builder: Builder, option: Option, value: OptionValue) -> bool:
    if option.name != "netdev":
        return "virtio" in value.get("model")
    cards = [o.parsed() for o in (*builder.recorded, *builder.own) if o.name == "device"]
    identity = value.get("id")
    return any(c.get("netdev") == identity and "virtio" in c.get("driver") for c in cards)


def _isolated(builder: Builder, option: Option, value: OptionValue) -> None:
    """Replace it with a hub that leads nowhere."""
    parts = [f"hubport,hubid={_FIRST_HUB + builder.recorded.index(option)}"]
    keys = ("id",) if option.name == "netdev" else ("id", *NIC_KEYS)
    parts += [f"{key}={escape_commas(text)}" for key in keys for text in value.all(key)]
    if any(not re.fullmatch(r"[\w.,=:-]*", part) for part in parts):
        builder.risk(option, "Stillframe does not know such names")
    builder.replace(option, option.with_value(",".join(parts)), _ALONE)
