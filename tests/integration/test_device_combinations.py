"""VMs of many devices and machine types: taken, then loaded by plain QEMU and by restore."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from guests.qemu import qemu_binary
from stillframe import api
from stillframe.store import open_snapshot
from stillframe.vmstate.description import split_description
from tests.support.probes import has_qemu, has_uffd_wp
from tests.support.round_trip import settled
from tests.support.stream_vm import QmpError, stream_vm

pytestmark = pytest.mark.qemu

NETWORK = ["-netdev", "user,id=n{0}", "-device", "{1},netdev=n{0}"]


def nics(*models: str) -> list[str]:
    return [part.format(n, model) for n, model in enumerate(models) for part in NETWORK]


PC = ["-M", "pc", "-nodefaults"]
Q35 = ["-M", "q35", "-nodefaults"]

MACHINES = {
    "two user networks, -nic": [*PC, "-nic", "user", "-nic", "user"],
    "three user networks": [*Q35, *nics("virtio-net-pci", "e1000", "rtl8139")],
    "user networks of several kinds": ["-M", "pc", *nics("ne2k_pci", "pcnet", "vmxnet3")],
    "tulip": [*PC, *nics("tulip", "tulip")],
    "dc390": [*PC, "-device", "dc390", "-device", "dc390"],
    **{
        model: [*PC, *nics(model, model)]
        for model in ("i82550", "i82551", "i82557a", "i82559er", "i82562", "i82801")
    },
    "eeprom and networks": [*PC, *nics("i82558b", "tulip", "e1000e", "virtio-net-pci", "i82801")],
    "sound": [*PC, "-audiodev", "none,id=a", "-device", "AC97,audiodev=a",
              "-device", "es1370,audiodev=a", "-device", "intel-hda",
              "-device", "hda-duplex,audiodev=a", "-device", "sb16,audiodev=a"],
    "serial": [*Q35, "-device", "pci-serial", "-device", "isa-serial,chardev=c",
               "-chardev", "null,id=c", "-device", "virtio-serial-pci",
               "-device", "virtconsole,chardev=c2", "-chardev", "null,id=c2"],
    "scsi": [*Q35, "-device", "lsi53c895a", "-device", "megasas", "-device", "mptsas1068",
             "-device", "am53c974", "-device", "virtio-scsi-pci"],
    "bridges": [*Q35, "-device", "pcie-root-port,id=r", "-device", "pcie-pci-bridge,id=b,bus=r",
                "-device", "e1000,bus=b,addr=1", "-device", "ioh3420,id=i,chassis=9",
                "-device", "pxb-pcie,bus_nr=20"],
    "usb": [*Q35, "-device", "qemu-xhci", "-device", "usb-hub", "-device", "usb-ccid",
            "-device", "usb-kbd", "-device", "ich9-usb-ehci1"],
    "watchdogs": [*PC, "-device", "i6300esb", "-device", "ib700", "-device", "pvpanic",
                  "-device", "vmcoreinfo", "-device", "vmgenid"],
    "displays": [*PC, "-device", "virtio-vga", "-device", "secondary-vga", "-device", "ati-vga",
                 "-device", "bochs-display"],
    "isapc": ["-M", "isapc", "-cpu", "qemu64", "-nodefaults", "-device", "ne2k_isa,netdev=n",
              "-netdev", "user,id=n", "-device", "isa-debug-exit"],
    "microvm": ["-M", "microvm"],
    "virtio-mem": ["-M", "q35", "-nodefaults", "-m", "64,maxmem=1G",
                   "-object", "memory-backend-ram,id=vm0,size=128M",
                   "-device", "virtio-mem-pci,memdev=vm0,id=v0,requested-size=0", "-nic", "user",
                   "-nic", "user"],
    "no footers": [*PC, "-global", "migration.send-section-footer=off", "-nic", "user"],
    "no configuration": [*Q35, "-global", "migration.send-configuration=off"],
    "no globalstate": [*Q35, "-global", "migration.store-global-state=off"],
    "no footers, virtio-mem": [
        *Q35, "-global", "migration.send-section-footer=off", "-m", "64,maxmem=1G",
        "-object", "memory-backend-ram,id=vm0,size=128M",
        "-device", "virtio-mem-pci,memdev=vm0,id=v0,requested-size=0",
    ],
    "footers where the type has none": [
        "-M", "pc-i440fx-2.3", "-global", "migration.send-section-footer=on",
    ],
    "configuration where the type has none": [
        "-M", "pc-i440fx-2.2", "-global", "migration.send-configuration=on",
    ],
    **{
        machine: ["-M", machine, "-nic", "user", "-nic", "user,model=i82551"]
        for machine in (
            "pc-i440fx-1.4", "pc-i440fx-1.7", "pc-i440fx-2.0", "pc-i440fx-2.2", "pc-i440fx-2.3",
            "pc-i440fx-2.4", "pc-i440fx-2.12", "pc-q35-2.4", "pc-q35-2.12", "pc-q35-6.0",
        )
    },
}  # fmt: skip


@pytest.fixture(params=MACHINES)
def arguments(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command line that this QEMU accepts."""
    has_qemu().require()
    has_uffd_wp().require()
    arguments = ["-m", "64", *MACHINES[request.param]]
    try:
        with stream_vm(arguments, tmp_path):
            return arguments
    except QmpError as error:
        if "unsupported machine type" in str(error) or "not a valid device" in str(error):
            pytest.skip(f"missing machine-type: {error}")
        raise


def take(monitor: Path, file: Path) -> list[tuple[str, int]]:
    """Take it; its device sections."""
    settled(lambda: api.take(str(monitor), file).wait(60))
    with open_snapshot(file) as snapshot:
        snapshot.verify(deep=True)
        return [(section.idstr, section.instance_id) for section in snapshot.skeleton().devices]


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_taken_and_loaded(arguments: list[str], paused: bool, tmp_path: Path) -> None:
    file, stream = tmp_path / "a.still", tmp_path / "stream"
    expected = "paused" if paused else "running"
    monitor = tmp_path / "second"
    monitoring = ["-qmp", f"unix:{monitor},server=on,wait=off"]
    with stream_vm([*arguments, *monitoring], tmp_path) as vm:
        if paused:
            vm.qmp("stop")
        taken = take(monitor, file)
        assert vm.status() == expected
        # QEMU 8.2 and later crash in describing a configuration section that they do not send.
        if paused and "migration.send-configuration=off" not in arguments:
            sent = described(vm.migrate())
            assert not sent or sent == [device for device in taken if device in sent]
            assert not sent or set(taken) - set(sent) <= {("globalstate", 0)}
    api.export(file, stream, format="qemu")
    with stream_vm([*arguments, "-incoming", f"exec:cat {stream}"], tmp_path) as loaded:
        loaded.wait_status(expected)
        assert "vmdescription" not in loaded.quit()
    restored = api.restore(file, trust=True, program=qemu_binary())
    try:
        assert restored.state == expected
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(restored.pid, signal.SIGKILL)
    stream.rename(tmp_path / "original")
    imported = tmp_path / "imported.still"
    api.import_stream(tmp_path / "original", imported)
    api.export(imported, stream, format="qemu")
    with stream_vm([*arguments, "-incoming", f"exec:cat {stream}"], tmp_path) as loaded:
        loaded.wait_status(expected)


def described(stream: bytes) -> list[tuple[str, int]]:
    """The device sections of QEMU's own migration, by its own description, if it has one."""
    _, text = split_description(stream[stream.rindex(b"\0") - 8 :], tail_offset=0)
    devices = json.loads(text)["devices"] if text else []
    return [(device["name"], device["instance_id"]) for device in devices]
