"""A guest, a snapshot of it, and a VM that is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import GuestVm, qemu_binary
from tests.integration.cli.program import run
from tests.support.listening import wait_listening
from tests.support.probes import has_linux_guest, has_qemu, has_uffd_wp


@pytest.fixture(scope="package")
def guest() -> Iterator[GuestVm]:
    """A guest with 64 MiB of data that does not compress."""
    has_uffd_wp().require()
    has_linux_guest().require()
    name = f"cli-test-{os.getpid()}"
    with GuestVm("linux", ram_mib=192, mem_mib=16, populate_mib=48, name=name).start() as vm:
        yield vm


@pytest.fixture(scope="package")
def snapshot(guest: GuestVm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the guest."""
    path = tmp_path_factory.mktemp("cli") / "a.still"
    done = run("take", guest.name, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def odd_vm() -> Iterator[str]:
    """QMP address of a stopped VM, without a guest, that cannot be snapshotted for two reasons."""
    has_qemu().require()
    directory = Path(tempfile.mkdtemp(prefix="stillframe-cli-"))
    socket = directory / "qmp"
    command = [qemu_binary(), "-nodefaults", "-no-user-config", "-accel", "tcg"]
    command += ["-M", "q35,memory-backend=ram"]
    command += ["-object", "memory-backend-memfd,id=ram,size=32M,share=on"]
    command += ["-m", "32M", "-display", "none", "-S", "-qmp", f"unix:{socket},server=on,wait=off"]
    command += ["-device", "virtio-balloon-pci,free-page-reporting=on"]
    command += ["-object", "memory-backend-ram,id=peer,size=1M,share=on"]
    command += ["-device", "ivshmem-plain,memdev=peer,master=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_listening(socket, alive=lambda: process.poll() is None)
        yield str(socket)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)
