"""What becomes of each option of a recorded command line (QEMU ``qemu-options.hx``, 5.2 to 10.2).

An option that is in none of the tables is kept only for a caller who says so (--trust).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from stillframe.restore import blockdevs, chardevs, disks, displays, networks, objects
from stillframe.restore.draft import Draft, Option
from stillframe.restore.option_value import OptionValue, split_commas

Handler = Callable[[Draft, Option], None]

_OWN = "give it yourself after --"

_KEPT_WORDS = """
nodefaults no-user-config nouserconfig nodefconfig cpu smp m uuid rtc vga name append
enable-kvm disable-kvm no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection
no-reboot no-shutdown no-acpi no-hpet no-fd-bootchk full-screen no-quit no-frame alt-grab
ctrl-grab portrait rotate show-cursor win2k-hack singlestep one-insn-per-tb usb no-audio
mem-prealloc only-migratable enable-sync-profile async-teardown action watchdog
watchdog-action overcommit msg echr sandbox runas seed dfilter d g prom-env compat
old-param balloon soundhw
"""
_KEPT: Final = frozenset(_KEPT_WORDS.split())
_SCANNED: Final = {
    "accel": "accel",
    "numa": "type",
    "iscsi": "initiator-name",
    "option-rom": "romfile",
}
_READ_FILES: Final = frozenset({"kernel", "dtb", "shim", "chroot"})
_SEARCHED_FILES: Final = frozenset({"bios", "L", "k"})
"""QEMU looks for them among its own files too, or does without."""
_DROPPED: Final = {
    "daemonize": "Stillframe starts it in the background itself",
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
    "readconfig": ("it reads more options from a file", "give those options after --"),
    "set": ("it changes other options past the plan", _OWN),
    "xen-domid": ("it belongs to a Xen domain", _OWN),
    "xen-attach": ("it belongs to a Xen domain", _OWN),
    "xen-domid-restrict": ("it belongs to a Xen domain", _OWN),
}


def _text_files(*keys: str) -> Handler:
    """Only these keys name files; the rest is text for the guest."""

    def handle(draft: Draft, option: Option) -> None:
        value = OptionValue(option.value, "")
        for key in keys:
            for text in value.all(key):
                draft.read_file(text, option)
        draft.keep(option)

    return handle


def _acpi_tables(draft: Draft, option: Option) -> None:
    value = OptionValue(option.value, "")
    for key in ("file", "data"):
        for name in value.get(key).split(":"):
            if name:
                draft.read_file(name, option)
    draft.keep(option)


def _modules(draft: Draft, option: Option) -> None:
    """``-initrd`` may be a list for multiboot: ``FILE ARGUMENTS,FILE ARGUMENTS``."""
    names = [option.value]
    if not Path(draft.resolve(option.value)).exists():
        names = [p.replace(",,", ",").split(" ")[0] for p in split_commas(option.value)]
    for name in names:
        draft.read_file(name, option)
    draft.keep(option)


def _debug_log(draft: Draft, option: Option) -> None:
    path = draft.private_file("debug", option)
    draft.replace(option, (option.words[0], path), "the first VM writes that log")


def _run_with(draft: Draft, option: Option) -> None:
    value = OptionValue(option.value, "")
    if value.drop("exit-with-parent"):
        if value.text:
            draft.replace(option, (option.words[0], value.text), "it goes on when Stillframe ends")
        else:
            draft.drop(option, "it goes on when Stillframe ends")
        return
    if value.get("chroot"):
        draft.read_file(value.get("chroot"), option)
    draft.keep(option)


def _plugin(draft: Draft, option: Option) -> None:
    value = OptionValue(option.value, "file")
    draft.touch("program", "run", draft.resolve(value.get("file")), option)
    draft.risk(option, "it loads code into QEMU")
    draft.scan(option, value, known=("file",))
    draft.keep(option)


def _semihosting(draft: Draft, option: Option) -> None:
    draft.risk(option, "the guest can use the files and run programs of the host")
    draft.keep(option)


def _icount(draft: Draft, option: Option) -> None:
    if OptionValue(option.value, "shift").names() & {"rr", "rrfile"}:
        draft.refuse(option, "it records or replays the first VM's run", _OWN)
    else:
        draft.keep(option)


def _machine(draft: Draft, option: Option) -> None:
    """The alias becomes the versioned type; the rest of ``-machine`` is kept."""
    value = OptionValue(option.value, "type")
    given, wanted = value.get("type"), draft.record.machine_type
    if value.drop("dumpdtb"):
        draft.note(f"{option.text}: dumpdtb is left out, it writes a file and ends")
    if given and wanted and given != wanted:
        value.set("type", wanted)
    draft.scan(option, value, known=("type", "append"))
    draft.replace(option, (option.words[0], value.text), "the machine by its versioned name")


_HANDLERS: Final[dict[str, Handler]] = {
    **dict.fromkeys(disks.SHORT_FORMS, disks.short_disk),
    "cdrom": disks.cdrom,
    "drive": disks.drive,
    "snapshot": disks.snapshot,
    "blockdev": blockdevs.blockdev,
    "serial": chardevs.serial,
    "parallel": chardevs.serial,
    "debugcon": chardevs.serial,
    "nographic": chardevs.default_serial,
    "chardev": chardevs.chardev,
    **dict.fromkeys(("qmp", "qmp-pretty", "monitor", "mon"), chardevs.monitor),
    **dict.fromkeys(("netdev", "nic", "net"), networks.network),
    "object": objects.qom_object,
    "device": objects.device,
    "global": objects.device_default,
    "mem-path": objects.memory_path,
    "fsdev": objects.shared_directory,
    "virtfs": objects.shared_directory,
    "usbdevice": objects.usb_device,
    "tpmdev": objects.tpm,
    "vnc": displays.vnc,
    "spice": displays.spice,
    "display": displays.display,
    "curses": displays.curses,
    "audiodev": displays.audio,
    "audio": displays.audio,
    "machine": _machine,
    "M": _machine,
    "boot": _text_files("splash"),
    "smbios": _text_files("file", "path"),
    "fw_cfg": _text_files("file"),
    "acpitable": _acpi_tables,
    "initrd": _modules,
    "D": _debug_log,
    "run-with": _run_with,
    "plugin": _plugin,
    "semihosting": _semihosting,
    "semihosting-config": _semihosting,
    "icount": _icount,
}


def decide(draft: Draft, option: Option) -> None:
    """Keep, rewrite, drop or refuse one recorded option."""
    name = option.name
    handler = _HANDLERS.get(name)
    if handler is not None:
        handler(draft, option)
    elif name in _KEPT:
        draft.keep(option)
    elif name in _SCANNED:
        draft.scan(option, OptionValue(option.value, _SCANNED[name]))
        draft.keep(option)
    elif name in _READ_FILES:
        draft.read_file(option.value, option)
        draft.keep(option)
    elif name in _SEARCHED_FILES:
        if "/" in option.value or Path(draft.resolve(option.value)).exists():
            draft.read_file(option.value, option, required=False)
        draft.keep(option)
    elif name in _DROPPED:
        draft.drop(option, _DROPPED[name])
    elif name in _REFUSED:
        draft.refuse(option, *_REFUSED[name])
    else:
        draft.risk(option, "Stillframe does not know what it does")
        draft.keep(option)
