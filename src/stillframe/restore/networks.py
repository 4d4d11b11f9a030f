"""Network backends: no port, interface or program of the first VM is used again.

Sources: QEMU ``qapi/net.json``, ``net/tap.c``, ``net/hub.c``.
"""

from __future__ import annotations

from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue, escape_commas

_FD_KEYS = ("fd", "fds", "vhostfd", "vhostfds")
_FIRST_HUB = 1000
_OWN_BACKEND = "give the option yourself after --, with the same id"
_PRIVATE = frozenset({"user", "tap", "hubport", "nic", "none", ""})
_ELSEWHERE = frozenset({"vhost-user", "vhost-vdpa"})
_NIC_KEYS = ("id", "model", "mac", "mac-address", "addr", "name", "macaddr")


def network(draft: Draft, option: Option) -> None:
    """``-netdev``, ``-nic`` and ``-net``."""
    value = OptionValue(option.value, "type")
    kind = value.get("type")
    if kind in _ELSEWHERE:
        draft.refuse(option, "a part of the network card is in another process", _OWN_BACKEND)
        return
    if value.drop(*_FD_KEYS) or value.get("addr.type") == "fd":
        draft.refuse(option, "it uses a file descriptor that the first VM was given", _OWN_BACKEND)
        return
    if kind == "user":
        _user(draft, option, value)
    elif kind == "tap":
        _tap(draft, option, value)
    elif kind in _PRIVATE:
        draft.keep(option)
    else:
        _isolated(draft, option, value)


def _user(draft: Draft, option: Option, value: OptionValue) -> None:
    reasons = []
    if value.drop("hostfwd"):
        reasons.append("the first VM has the forwarded ports")
    if value.get("smb"):
        value.drop("smb", "smbserver")
        reasons.append("smb= would start smbd")
    for target in value.all("guestfwd"):
        address = target.partition("-")[2]
        if address.startswith("cmd:"):
            draft.touch("program", "run", address.removeprefix("cmd:"), option)
            draft.risk(option, f"the guest can run a program of the host: {address}")
        else:
            draft.touch("network", "connect", address, option)
    if value.get("tftp"):
        draft.read_file(value.get("tftp"), option)
    draft.touch("network", "connect", "whatever the guest asks for", option)
    draft.scan(option, value, known=("guestfwd", "tftp", "bootfile", "id", "net", "ipv6-net"))
    draft.replace(option, (option.words[0], value.text), ", ".join(reasons))


def _tap(draft: Draft, option: Option, value: OptionValue) -> None:
    dropped = value.drop("ifname", "helper", "br")
    value.set("script", "no")
    value.set("downscript", "no")
    draft.touch("network", "create", "a new tap interface, connected to nothing", option)
    reason = "scripts are not run, and no bridge is joined"
    if "ifname" in dropped:
        reason = f"the first VM has the interface; {reason}"
    draft.scan(option, value, known=("script", "downscript", "id"))
    draft.replace(option, (option.words[0], value.text), reason)


def _isolated(draft: Draft, option: Option, value: OptionValue) -> None:
    """A hub without a way out: two VMs with one MAC address must not meet on one network."""
    hub = _FIRST_HUB + draft.recorded.index(option)
    parts = [f"hubport,hubid={hub}"]
    parts += [f"{key}={escape_commas(text)}" for key in _NIC_KEYS for text in value.all(key)]
    if option.name == "netdev":
        parts = [part for part in parts if part.partition("=")[0] in ("hubport,hubid", "id")]
    draft.replace(
        option,
        (option.words[0], ",".join(parts)),
        "the first VM may be on that network with the same address; connected to nothing now",
    )
