"""``-device`` and ``-global``: an allow-list of devices, and of what their properties may name.

Sources: QEMU ``-device help``, QMP ``device-list-properties`` (types ``str``), of 7.2 to 10.2.
"""

from __future__ import annotations

import re
import secrets
import uuid

from stillframe.restore.builder import OWN, UNKNOWN, Builder
from stillframe.restore.option import Option
from stillframe.restore.option_value import OptionValue

_REFUSED = {
    "vfio-": "the first VM has the device, and its state cannot be restored",
    "vhost-user-": "a part of it is in another process",
    "vhost-vdpa": "the first VM has the device",
    "vhost-scsi": "a part of it is in the kernel",
    "usb-host": "the first VM has the device, and its state cannot be restored",
    "x-pci-proxy-dev": "a part of it is in another process",
    "virtio-input-host": "it takes an input device of the host",
    "scsi-generic": "the guest commands a device of the host directly",
    "scsi-block": "the guest commands a disk of the host directly",
    "u2f-passthru": "it is tied to a device of the host",
    "ivshmem-doorbell": "it shares memory with other processes",
}
_KNOWN = re.compile(
    r"""virtio-(9p|balloon|blk|crypto|gpu|iommu|keyboard|mem|mouse|multitouch|net|nsm|pmem|rng|scsi
    |serial|sound|tablet)(-(pci|device|ccw))?(-(non-)?transitional)?
    |virtio-vga|vhost-vsock-(pci|device|ccw)(-(non-)?transitional)?
    |[\w.-]+-(x86_64|i386|arm|s390x|riscv\d*|powerpc64|loongarch)-cpu
    |e1000(e|-\w+)?|i8(2550|2551|2557[abc]|2558[ab]|2559(er|[abc])|2562|2801)|igb|i8042|i6300esb
    |ich9-(ahci|intel-hda|usb-[eu]hci\d)|piix[34]-(ide|usb-uhci)|isa-[\w-]+|pci-serial(-[24]x)?
    |ide-(hd|cd)|scsi-(hd|cd)|lsi53c\w+|am53c974|dc390|megasas(-gen2)?|mptsas1068|pvscsi
    |(nec-usb|qemu|sysbus)-xhci|usb-(audio|bot|ccid|ehci|hub|kbd|mouse|net|redir|serial|storage
    |tablet|uas|wacom-tablet|braille|mtp)|pci-(ohci|bridge|bridge-seat|ipmi-bt|ipmi-kcs|testdev)
    |pcie-(pci-bridge|root-port)|pxb(-pcie|-cxl)?|x?io3130-\w+|x3130-upstream|ioh3420
    |i82801b11-bridge|cxl-(downstream|upstream|rp)|(intel|amd)-iommu|AMDVI-PCI
    |AC97|ES1370|adlib|cs4231a|gus|sb16|hda-(duplex|micro|output)|intel-hda
    |VGA|cirrus-vga|isa-cirrus-vga|bochs-display|ati-vga|qxl(-vga)?|secondary-vga|ramfb|vmware-svga
    |sga|rtl8139|ne2k_(isa|pci)|pcnet|tulip|vmxnet3|rocker|edu|floppy|ib700|nvme(-ns|-subsys)?
    |nvdimm|pc-dimm|sd-card|sdhci-pci|mc146818rtc|vmcoreinfo|vmgenid|vmmouse|pvpanic(-pci)?
    |tpm-(crb|tis|spapr)|virtconsole|virtserialport|ccid-card-passthru|ipmi-bmc-(sim|extern)
    |smbus-ipmi|ivshmem-plain|acpi-erst|loader|guest-loader|hv-syndbg|vmbus-bridge|i2c-ddc
    |ctucan_pci|kvaser_pci|mioe3680_pci|pcm3680_pci|tpci200|ipoctal232""",
    re.VERBOSE,
)
_SOUND = re.compile(
    r"AC97|ES1370|adlib|cs4231a|gus|sb16|hda-(duplex|micro|output)|usb-audio|virtio-sound-.*"
)
_TEXTS_WORDS = """
driver id bus addr drive netdev memdev chardev chardev0 chardev1 chardev2 chardev3 chardev4
chardev5 chardev6 chardev7 audiodev iothread iothread-vq-mapping.iothread
iothread-vq-mapping.vqs rng fsdev tpmdev cryptodev bmc subsys canbus canbus0 canbus1 primary-bus
primary_bus lsa pmrdev mac macaddr fp_start_macaddr serial hba_serial label name ver model vendor
product device_id desc tag mount_tag guid uuid osk nqn wwpn port failover_pair_id tx rerror werror
lost_tick_policy display duplex fdtypeA fdtypeB fallback drive-type bios-chs-trans masterbus
model-id hv-vendor-id type bus_nr x-speed x-width queue-size physical-block-size logical-block-size
backend-driver xfer intremap policy edid-name granule ports busnr acpi-index property discard
rombar-name bar-name prealloc-context
"""
_TEXTS = frozenset(_TEXTS_WORDS.split())
_FILES_WORDS = "romfile file kernel initrd sdrfile frudatafile cdat rootdir"
_FILES = frozenset(_FILES_WORDS.split())
_HOST_WORDS = """
sysfsdev host evdev hidraw db hostdevice host_ip hostport ibdev filter bootargs cert1 cert2 cert3
backend world socket path blob
"""
_HOST = frozenset(_HOST_WORDS.split())
_SHORT_GLOBAL = re.compile(r"([^.=]{1,63})\.([^=]{1,63})=(.*)", re.DOTALL)
"""The form that QEMU tries first (``qemu_global_option``)."""
_FIRST_CID = 1 << 16


def device(builder: Builder, option: Option) -> None:
    """``-device``."""
    value = option.parsed()
    driver = value.get("driver")
    for prefix, reason in _REFUSED.items():
        if driver.startswith(prefix):
            builder.refuse(option, reason, f"{OWN}, with the same id or driver")
            return
    if not _KNOWN.fullmatch(driver):
        builder.risk(option, f"Stillframe does not know the device {driver}")
    reason = ""
    if driver.startswith("vhost-vsock"):
        value.drop("vhostfd")
        value.set("guest-cid", str(_FIRST_CID + secrets.randbelow(1 << 30)))
        builder.touch("device", "write", "/dev/vhost-vsock", option)
        reason = "the first VM has the context id"
    if driver == "vmgenid":
        # The spec wants a new id whenever a snapshot is applied; QEMU writes it into the guest's
        # RAM after loading the state, and tells the guest (hw/acpi/vmgenid.c).
        value.set("guid", str(uuid.uuid4()))
        reason = "a new generation id, by which the guest knows that it was restored"
    if value.drop("pcap"):
        reason = "the first VM writes that file"
    texts = set(_TEXTS)
    if driver == "usb-mtp":
        path = builder.resolve(value.get("rootdir"))
        builder.touch("file", "write", path, option, reason=f"the guest may write to {path}")
        texts.add("rootdir")
    if driver == "usb-redir":
        builder.note("what is redirected over USB stays with the first VM")
    if _SOUND.fullmatch(driver) and not value.get("audiodev"):
        # QEMU takes what the host has, unless told otherwise (audio/audio.c).
        builder.touch("device", "write", "the host's sound, if QEMU finds any", option)
    texts |= {"loader": {"data"}, "guest-loader": {"bootargs"}}.get(driver, set())
    builder.judge(option, value, plain=texts, files=_FILES - texts, host=_HOST - texts)
    builder.set_value(option, value, reason)


def device_default(builder: Builder, option: Option) -> None:
    """``-global``: what ``-device`` may say, for all devices of a kind."""
    if match := _SHORT_GLOBAL.match(option.value):
        driver, key, text = match.groups()
    else:
        value = OptionValue(option.value, "driver", json=False)
        driver, key, text = (value.get(name) for name in ("driver", "property", "value"))
        if not key:
            builder.risk(option, UNKNOWN)
    if key == "pcap":
        builder.drop(option, "the first VM writes that file")
        return
    if key in ("drive", "chardev", "netdev"):
        builder.risk(option, f"it ties every {driver} to something of the host")
    pair = OptionValue("", "")
    pair.set(key or "driver", text)
    builder.judge(option, pair, plain=_TEXTS, files=_FILES, host=_HOST)
    builder.keep(option)
