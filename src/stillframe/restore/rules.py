"""The rules for the options of a recorded command line (QEMU ``qemu-options.hx``, 5.2 to 10.2).

An option in none of the tables is kept only if the caller says so (--trust).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from stillframe.restore import blockdevs, chardevs, devices, displays, drives, memory, networks
from stillframe.restore.builder import OWN, UNKNOWN, Builder
from stillframe.restore.objects import qom_object
from stillframe.restore.option import JSON_OPTIONS, Option
from stillframe.restore.option_value import OptionValue, split_commas

Rule = Callable[[Builder, Option], None]

_TEXT_WORDS = """
nodefaults no-user-config nouserconfig nodefconfig cpu smp m uuid rtc vga name append
enable-kvm disable-kvm no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection
no-reboot no-shutdown no-acpi no-hpet no-fd-bootchk full-screen no-quit no-frame alt-grab
ctrl-grab portrait rotate show-cursor win2k-hack singlestep one-insn-per-tb usb no-audio
only-migratable enable-sync-profile async-teardown action watchdog
watchdog-action msg echr sandbox seed dfilter d g prom-env compat
old-param balloon id
"""
_TEXT: Final = frozenset(_TEXT_WORDS.split())
"""Options whose values concern the guest, or QEMU alone."""
_READ_FILES: Final = frozenset({"kernel", "dtb", "shim"})
_SEARCHED_FILES: Final = frozenset({"bios", "L", "k"})
"""QEMU also looks for these among its own files, or does without them."""
_JAIL: Final = "the restored VM's own files are outside of it"
_USER: Final = "it runs as that user from its start"
_DROPPED: Final = {
    "daemonize": "Stillframe starts it in the background itself",
    "chroot": _JAIL,
    "runas": _USER,
    "pidfile": "the file has the first VM's process number",
    "incoming": "the snapshot comes in instead",
    "loadvm": "the snapshot is loaded instead",
    "S": "the snapshot tells whether it runs",
    "preconfig": "nobody would end the waiting",
    "gdb": "the first VM may have the port",
    "s": "the first VM may have the port",
    "trace": "the first VM may write the trace file",
    "writeconfig": "it writes a file",
    "dump-vmstate": "it writes a file and ends",
    "perfmap": "it writes a file",
    "jitdump": "it writes a file",
    "qtest": "nothing drives the test",
    "qtest-log": "nothing drives the test",
    "add-fd": "the file descriptor was the first VM's",
}
_REFUSED: Final = {
    "readconfig": ("it reads more options from a file", "give -readconfig yourself after --"),
    "set": ("it changes other options past the plan", "give every -set yourself after --"),
    "xen-domid": ("it belongs to a Xen domain", OWN),
    "xen-attach": ("it belongs to a Xen domain", OWN),
    "xen-domid-restrict": ("it belongs to a Xen domain", OWN),
    "tpmdev": (
        "the TPM and its state are not in the VM",
        "start another swtpm, and give -chardev and -tpmdev with the same ids after --",
    ),
}
_ISCSI_TEXTS = ("user", "password", "password-secret", "header-digest", "initiator-name")
_MACHINE_WORDS = """
type append accel pflash0 pflash1 memory-backend pcspk-audiodev smp-cache.0.cache gic-version
kernel-irqchip max-ram-below-4g hpet memory-encryption confidential-guest-support x-oem-id
x-oem-table-id nvdimm-persistence cxl-fmw.0.targets.0
"""
_MACHINE_TEXTS: Final = frozenset(_MACHINE_WORDS.split())
_MACHINE_FILES: Final = ("kernel", "initrd", "dtb", "firmware", "shim")


def _keyed(*plain: str, files: tuple[str, ...] = (), implied: str = "") -> Rule:
    """Return a rule: known keys hold texts or file names, all others numbers or switches."""

    def rule(builder: Builder, option: Option) -> None:
        value = OptionValue(option.value, implied, json=False)
        builder.judge(option, value, plain=plain, files=files)
        builder.keep(option)

    return rule


def _acpi_tables(builder: Builder, option: Option) -> None:
    value = OptionValue(option.value, "data", json=False)
    for key in ("file", "data"):
        for text in value.all(key):
            for name in filter(None, text.split(":")):
                builder.read_file(name, option)
    texts = ("sig", "oem_id", "oem_table_id", "asl_compiler_id", "file", "data")
    builder.judge(option, value, plain=texts)
    builder.keep(option)


def _modules(builder: Builder, option: Option) -> None:
    """``-initrd`` may be a list for multiboot: ``FILE ARGUMENTS,FILE ARGUMENTS``."""
    names = [option.value]
    if not os.path.exists(builder.resolve(option.value)):  # noqa: PTH110 - a list may be long
        names = [p.replace(",,", ",").split(" ")[0] for p in split_commas(option.value)]
    for name in names:
        builder.read_file(name, option)
    builder.keep(option)


def _debug_log(builder: Builder, option: Option) -> None:
    path = builder.private_file("debug", option)
    builder.replace(option, option.with_value(path), "the first VM writes that log")


def _run_with(builder: Builder, option: Option) -> None:
    value = OptionValue(option.value, "", json=False)
    reasons = {
        "exit-with-parent": "it goes on when Stillframe ends", "chroot": _JAIL, "user": _USER,
    }  # fmt: skip
    reason = ", ".join(why for key, why in reasons.items() if value.drop(key))
    builder.judge(option, value)
    if value.text:
        builder.set_value(option, value, reason)
    else:
        builder.drop(option, reason)


def _plugin(builder: Builder, option: Option) -> None:
    value = option.parsed()
    path = builder.resolve(value.get("file"))
    builder.touch("program", "run", path, option, reason="it loads code into QEMU")
    builder.judge(option, value, plain=("file",))
    builder.keep(option)


def _semihosting(builder: Builder, option: Option) -> None:
    builder.risk(option, "the guest can use the files and run programs of the host")
    builder.keep(option)


def _icount(builder: Builder, option: Option) -> None:
    value = option.parsed()
    if value.names() & {"rr", "rrfile"}:
        builder.refuse(option, "it records or replays the first VM's run")
        return
    builder.judge(option, value)
    builder.keep(option)


def _machine(builder: Builder, option: Option) -> None:
    """Replace the alias with the versioned type; keep the rest of ``-machine``."""
    value = OptionValue(option.value, "type", json=False)
    given, wanted = value.get("type"), builder.record.machine_type
    if value.drop("dumpdtb"):
        builder.note(f"{option.text}: dumpdtb is left out, it writes a file and ends")
    if given and wanted and given != wanted:
        value.set("type", wanted)
    _check_accelerators(builder, option, value)
    builder.judge(option, value, plain=_MACHINE_TEXTS, files=_MACHINE_FILES)
    builder.set_value(option, value, "the machine by its versioned name")


def _accel(builder: Builder, option: Option) -> None:
    value = option.parsed()
    _check_accelerators(builder, option, value)
    builder.judge(option, value, plain=("accel", "thread", "kernel-irqchip", "notify-vmexit"))
    builder.keep(option)


def _check_accelerators(builder: Builder, option: Option, value: OptionValue) -> None:
    for name in {name for text in value.all("accel") for name in text.split(":")}:
        if name not in ("kvm", "tcg", "hvf"):
            builder.risk(option, f"Stillframe does not know the accelerator {name}")


def _shared_directory(builder: Builder, option: Option) -> None:
    """``-fsdev`` and ``-virtfs``."""
    value = option.parsed()
    kind = value.get("fsdriver")
    if kind not in ("local", "synth"):
        builder.refuse(option, "it needs the first VM's helper process")
        return
    if kind == "local":
        path = builder.resolve(value.get("path"))
        if value.is_on("readonly"):
            builder.touch("file", "read", path, option, required=True)
        else:
            reason = f"the guest can change what is in {path}"
            builder.touch("file", "write", path, option, required=True, reason=reason)
    texts = ("fsdriver", "id", "mount_tag", "security_model", "writeout", "multidevs", "path")
    builder.judge(option, value, plain=texts)
    builder.keep(option)


def _usb_device(builder: Builder, option: Option) -> None:
    """``-usbdevice``."""
    if option.value in ("tablet", "mouse", "keyboard", "wacom-tablet", "ccid"):
        builder.keep(option)
    else:
        builder.refuse(option, "it is tied to a device of the host", "use -device after --")


_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(drives.SHORT_FORMS, drives.drive),
    "drive": drives.drive,
    "snapshot": drives.snapshot,
    "blockdev": blockdevs.blockdev,
    **dict.fromkeys(("serial", "parallel", "debugcon"), chardevs.serial),
    "nographic": chardevs.default_serial,
    "chardev": chardevs.chardev,
    **dict.fromkeys(("qmp", "qmp-pretty", "monitor", "mon"), chardevs.monitor),
    **dict.fromkeys(("netdev", "nic", "net"), networks.network),
    "object": qom_object,
    "device": devices.device,
    "global": devices.device_default,
    "mem-path": memory.memory_path,
    "mem-prealloc": memory.all_at_once,
    "overcommit": memory.overcommit,
    **dict.fromkeys(("fsdev", "virtfs"), _shared_directory),
    "usbdevice": _usb_device,
    "vnc": displays.vnc,
    "spice": displays.spice,
    "display": displays.display,
    "curses": displays.curses,
    **dict.fromkeys(("audiodev", "audio"), displays.audio),
    "soundhw": displays.old_audio,
    **dict.fromkeys(("machine", "M"), _machine),
    "accel": _accel,
    "numa": _keyed("type", "cpus", "memdev", "hierarchy", "data-type", "associativity", "policy",
                   implied="type"),
    "iscsi": _keyed(*_ISCSI_TEXTS),
    "boot": _keyed("order", "once", "menu", "strict", files=("splash",), implied="order"),
    "smbios": _keyed("vendor", "version", "date", "release", "manufacturer", "product", "serial",
                     "uuid", "sku", "family", "asset", "location", "sock_pfx", "part", "loc_pfx",
                     "bank", "value", "processor-id", "processor-family", "designation", "kind",
                     "internal_reference", "external_reference", "connector_type", "port_type",
                     "slot_design_type", "pcidev", files=("file", "path")),
    "fw_cfg": _keyed("name", "string", "gen_id", files=("file",), implied="name"),
    "acpitable": _acpi_tables,
    "option-rom": _keyed(files=("romfile",), implied="romfile"),
    "initrd": _modules,
    "D": _debug_log,
    "run-with": _run_with,
    "plugin": _plugin,
    **dict.fromkeys(("semihosting", "semihosting-config"), _semihosting),
    "icount": _icount,
}  # fmt: skip


def decide(builder: Builder, option: Option) -> None:
    """Keep, rewrite, drop or refuse one recorded option."""
    name = option.name
    rule = _RULES.get(name)
    if rule is not None and option.value.startswith("{") and name not in JSON_OPTIONS:
        builder.risk(option, UNKNOWN)
        builder.refuse(option, "QEMU takes no JSON there")
    elif rule is not None:
        rule(builder, option)
    elif name in _TEXT:
        builder.keep(option)
    elif name in _READ_FILES:
        builder.read_file(option.value, option)
        builder.keep(option)
    elif name in _SEARCHED_FILES:
        builder.search_file(option.value, option)
        builder.keep(option)
    elif name in _DROPPED:
        builder.drop(option, _DROPPED[name])
    elif name in _REFUSED:
        builder.refuse(option, *_REFUSED[name])
    else:
        builder.risk(option, UNKNOWN)
        builder.keep(option)
