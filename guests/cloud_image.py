"""A Debian system like a cloud image: systemd, cloud-init, the guest agent. Building needs root.

Once cloud-init is done, the guest prints ``tick N`` on its serial line every second, and keeps N in
a file that it syncs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from guests.build import cache_directory
from stillframe.errors import HostError

COUNTER = "/root/counter"
_RELEASE = "bookworm"
_PACKAGES = (
    "linux-image-cloud-amd64 cloud-init cloud-guest-utils qemu-guest-agent openssh-server"
    " netplan.io iproute2 kmod e2fsprogs procps udev dbus"
)
_DISK_BYTES = 2 << 30
_TIMEOUT_S = 1200
_USER_DATA = f"""#cloud-config
hostname: cloud
runcmd:
- - sh
  - -c
  - "(n=0; while sleep 1; do n=$((n+1)); echo tick $n >/dev/ttyS0; echo $n >{COUNTER}; sync; done)&"
"""


class CloudImage(NamedTuple):
    """A built image. ``disk``: a raw image of one ext4 file system, without partitions.
    ``kernel``, ``initrd``: the system's own."""

    disk: Path
    kernel: Path
    initrd: Path

    def arguments(self, disk: Path, size_bytes: int) -> list[str]:
        """Make an overlay at ``disk``; return QEMU's arguments for a VM on it."""
        words = ["-f", "qcow2", "-b", str(self.disk), "-F", "raw", str(disk), str(size_bytes)]
        _run("qemu-img", "create", "-q", *words)
        append = "root=/dev/vda ro console=ttyS0 mitigations=off"
        drive = f"file={disk},format=qcow2,if=virtio"
        return [
            *("-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", append),
            *("-drive", drive),
        ]


def cloud_image() -> CloudImage:
    """Return the cached image; build it with debootstrap if there is none.

    Raises:
        HostError: a tool is missing, the packages cannot be fetched, or we are not root.
    """
    place = cache_directory("cloud") / _RELEASE
    if not place.is_dir():
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            raise HostError(
                "a cloud image cannot be built", remedy="be root, and apt-get install debootstrap"
            )
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            _build(Path(scratch))
            Path(scratch, "image").rename(place)
    return CloudImage(place / "disk.raw", place / "vmlinuz", place / "initrd")


def _build(scratch: Path) -> None:
    root, image = scratch / "root", scratch / "image"
    image.mkdir()
    words = ["--variant=minbase", "--include=systemd-sysv", _RELEASE, str(root)]
    _run("debootstrap", *words)
    with _proc(root):
        # In a second step, because debootstrap does not resolve alternatives.
        _run("chroot", str(root), "apt-get", "update", "-q")
        install = ["apt-get", "install", "-yq", "--no-install-recommends", *_PACKAGES.split()]
        _run("chroot", str(root), *install)
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw,discard,errors=remount-ro 0 1\n")
    seed = root / "var/lib/cloud/seed/nocloud"
    seed.mkdir(parents=True)
    (seed / "meta-data").write_text("instance-id: cloud-1\n")
    (seed / "user-data").write_text(_USER_DATA)
    for kind, name in (("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")):
        shutil.copyfile(next((root / "boot").glob(f"{kind}-*")), image / name)
    with (image / "disk.raw").open("wb") as disk:
        disk.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", "-d", str(root), str(image / "disk.raw"))


@contextlib.contextmanager
def _proc(root: Path) -> Iterator[None]:
    _run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        yield
    finally:
        _run("umount", str(root / "proc"))


def _run(*command: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
        check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise HostError(f"{' '.join(command[:3])} failed", why=(done.stderr or done.stdout)[-300:])
