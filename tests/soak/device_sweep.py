"""Every device of ``-device help`` that can be added without hardware, taken and restored.

``python -m tests.soak.device_sweep --write docs/reference/devices.md`` makes the table of the
QEMU in the PATH and of a newer one; ``test_device_sweep.py`` checks that none was harmed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from guests.qemu import qemu_binary
from stillframe import api
from stillframe.errors import RefusedError, StillframeError
from stillframe.qmp.client import QmpClient
from tests.support.listening import wait_listening
from tests.support.newer_qemu import newer_qemu, qemu_version

_TIMEOUT_S = 60.0
_MACHINE = ("-nodefaults", "-display", "none", "-accel", "tcg", "-M", "q35,nvdimm=on")
_MEMORY = ("-m", "64M,slots=2,maxmem=1G")
_BACKENDS = {
    "drive": (
        "d0",
        "-blockdev",
        "driver=null-co,node-name=d0,read-zeroes=on,size=67108864",
    ),
    "netdev": ("n0", "-netdev", "user,id=n0"),
    "chardev": ("c0", "-chardev", "null,id=c0"),
    "memdev": ("m0", "-object", "memory-backend-ram,id=m0,size=128M"),
    "audiodev": ("a0", "-audiodev", "none,id=a0"),
    "cryptodev": ("k0", "-object", "cryptodev-backend-builtin,id=k0"),
    "canbus": ("can0", "-object", "can-bus,id=can0"),
    "canbus0": ("can0", "-object", "can-bus,id=can0"),
    "fsdev": ("f0", "-fsdev", "local,id=f0,path=/usr/share/misc,security_model=none"),
    "bmc": ("b0", "-device", "ipmi-bmc-sim,id=b0"),
}
"""By property: the value, and what makes it."""
_BUSES: dict[str, tuple[str, ...]] = {
    "usb-bus": ("-device", "qemu-xhci"),
    "SCSI": ("-device", "virtio-scsi-pci"),
    "HDA": ("-device", "intel-hda"),
    "ccid-bus": ("-device", "qemu-xhci", "-device", "usb-ccid"),
    "virtio-serial-bus": ("-device", "virtio-serial-pci"),
    "sd-bus": ("-device", "sdhci-pci"),
    "IndustryPack": ("-device", "tpci200"),
    "nvme-bus": ("-device", "nvme-subsys,id=s0", "-device", "nvme,serial=1,subsys=s0"),
    "floppy-bus": ("-device", "isa-fdc"),
    "vmbus": ("-device", "vmbus-bridge"),
    "ufs-bus": ("-device", "ufs,serial=1"),
}
_WANTED = {
    "nvme": "serial=1",
    "ufs": "serial=1",
    "pci-bridge": "chassis_nr=1",
    "pci-bridge-seat": "chassis_nr=1",
    "usb-mtp": "rootdir=/usr/share/misc",
}
"""Properties without which a device is not made."""
_WITHOUT_HARDWARE = re.compile(
    r"(?!vfio-|.*-vfio-|usb-host$|usb-redir$|vhost-|.*-passthru|x-pci-proxy|scsi-block|scsi-generic"
    r"|ivshmem-doorbell|xen-|.*-cpu$|virtio-input-host)"
)
"""Not: what passes a host's device or another process through, and what no PC is started with."""


class Swept(msgspec.Struct, frozen=True):
    """``outcome``: ``restored``, ``refused``, ``not added``, or what must not be: ``harmed``,
    ``failed`` (the guest is fine), ``not restored``. ``words``: the reason."""

    device: str
    outcome: str
    words: str = ""


def devices(program: str) -> list[tuple[str, str]]:
    """(name, bus) of every device that the QEMU offers."""
    said = _said([program, "-M", "q35", "-device", "help"])
    found = re.findall(r'^name "([^"]+)"(?:, bus ([\w-]+))?', said, re.MULTILINE)
    return sorted((name, bus) for name, bus in found if _WITHOUT_HARDWARE.match(name))


def sweep(program: str, names: Sequence[str] = ()) -> Iterator[Swept]:
    """Try each (or the named ones) in a VM of its own."""
    for name, bus in devices(program):
        if not names or name in names:
            yield _tried(program, name, bus)


def _said(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
    )
    return done.stdout


def _arguments(program: str, name: str, bus: str) -> list[str]:
    properties = set(
        re.findall(r"^  ([\w.-]+)=<", _said([program, "-device", f"{name},help"]), re.M)
    )
    words = list(_BUSES.get(bus, ()))
    option = [name, "id=x0"]
    if name in _WANTED:
        option.append(_WANTED[name])
    for prop, (value, *makes) in _BACKENDS.items():
        if prop in properties or (prop == "fsdev" and name.startswith("virtio-9p-pci")):
            words += makes
            option.append(f"{prop}={value}")
    return [*words, "-device", ",".join(option)]


def _tried(program: str, name: str, bus: str) -> Swept:
    with tempfile.TemporaryDirectory(prefix="sweep-") as directory:
        monitor, log = Path(directory, "qmp"), Path(directory, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [program, *_MACHINE, *_MEMORY, *_arguments(program, name, bus),
                 "-qmp", f"unix:{monitor},server=on,wait=off"],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip
        try:
            if not _starts(monitor, process):
                return Swept(name, "not added", _last(log))
            time.sleep(0.3)  # the BIOS looks at the device
            return _taken(program, name, monitor, Path(directory, "a.still"), process)
        finally:
            process.kill()
            process.wait()


def _starts(monitor: Path, process: subprocess.Popen[bytes]) -> bool:
    """The monitor is there before the devices; it answers once they are."""
    try:
        wait_listening(monitor, _TIMEOUT_S, lambda: process.poll() is None)
        with QmpClient.connect(str(monitor), timeout_s=_TIMEOUT_S) as qmp:
            qmp.execute("query-status")
    except (StillframeError, RuntimeError):
        _until(lambda: process.poll() is not None)
        return False
    return True


def _taken(
    program: str, name: str, monitor: Path, file: Path, process: subprocess.Popen[bytes]
) -> Swept:
    try:
        api.take(str(monitor), file).wait(_TIMEOUT_S)
    except RefusedError as error:
        return Swept(name, "refused", error.why or error.what)
    except (StillframeError, TimeoutError) as error:
        time.sleep(0.2)
        return Swept(name, "harmed" if process.poll() is not None else "failed", str(error))
    time.sleep(0.1)
    if process.poll() is not None:
        return Swept(name, "harmed", f"ended by {process.returncode}")
    try:
        restored = api.restore(file, trust=True, program=program)
    except StillframeError as error:
        return Swept(name, "not restored", str(error))
    try:
        time.sleep(0.3)
        gone = not Path(f"/proc/{restored.pid}/exe").exists()
        lived = not gone and restored.state == "running"
        return Swept(name, "restored" if lived else "not restored", "" if lived else "it ended")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(restored.pid, signal.SIGKILL)


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return re.sub(r"^.*?qemu-system-x86_64: (-device [^:]*: )?", "", lines[-1]) if lines else ""


def table(columns: dict[str, dict[str, Swept]]) -> str:
    """Markdown: a row for each device that some QEMU could be given, a column for each QEMU."""
    names = sorted(
        {
            name
            for column in columns.values()
            for name, swept in column.items()
            if swept.outcome != "not added"
        }
    )
    lines = [f"| Device | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = [_cell(column.get(name)) for column in columns.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(swept: Swept | None) -> str:
    if swept is None or swept.outcome == "not added":
        return "-"
    words = re.split(r"[;|]", swept.words)[0].strip()
    return f"{swept.outcome}: {words}" if words and swept.outcome != "restored" else swept.outcome


def main() -> None:
    """Sweep the QEMU of the PATH and a newer one; write the table below the page's last heading."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", type=Path, help="the page to write the table into")
    options.add_argument("names", nargs="*", help="only these devices")
    given = options.parse_args()
    columns: dict[str, dict[str, Swept]] = {}
    for program in (qemu_binary(), newer_qemu()):
        column = columns.setdefault("QEMU " + ".".join(map(str, qemu_version(program))), {})
        for swept in sweep(program, given.names):
            print(swept.device, swept.outcome, swept.words, sep="\t", flush=True)
            column[swept.device] = swept
    if given.write:
        page = given.write.read_text()
        head = page[: page.index("\n", page.rindex("\n## ") + 1)]
        given.write.write_text(f"{head}\n\n{table(columns)}")


if __name__ == "__main__":
    main()
