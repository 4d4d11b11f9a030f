"""What a device, another job or the host forbids: each remedy is carried out, and helps."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from stillframe import api
from stillframe.errors import BusyError, RefusedError, StillframeError
from stillframe.machine.process import preflight_host
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_map
from tests.support import nine_p
from tests.support.bare_vm import BareVm
from tests.support.memory_guest import MemoryGuest
from tests.support.probes import has_linux_guest, has_uffd_wp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def _needs() -> None:
    has_uffd_wp().require()


def take(vm: str, directory: Path, **options: object) -> None:
    api.take(vm, directory / f"{time.monotonic_ns()}.still", **options).wait(120)  # type: ignore[arg-type]


def refused(vm: str, directory: Path, kind: type[StillframeError] = RefusedError) -> str:
    """Its name and remedy; nothing was touched."""
    with pytest.raises(kind) as caught:
        take(vm, directory)
    assert caught.value.guest_state == "running"
    return f"{caught.value}; {caught.value.remedy}"


def test_a_9p_file_system_is_unmounted(tmp_path: Path) -> None:
    shared, wire = tmp_path / "shared", tmp_path / "qtest"
    shared.mkdir()
    words = ("-fsdev", f"local,id=f,path={shared},security_model=none", *nine_p.ARGUMENTS)
    with BareVm("-m", "64", *words, "-qtest", f"unix:{wire},server=on,wait=off") as vm:
        take(vm.qmp, tmp_path)
        guest = nine_p.NinePGuest(wire, Path(vm.second_qmp))
        guest.mount()
        said = refused(vm.qmp, tmp_path)
        assert "migration-blocker" in said
        assert f"unmount the guest's 9p file system of {shared}" in said
        guest.unmount()
        guest.close()
        take(vm.qmp, tmp_path)


@pytest.mark.parametrize("device", ["nvme,serial=1", "amd-iommu"])
def test_a_device_that_cannot_be_migrated_is_left_out(tmp_path: Path, device: str) -> None:
    plain = ("-M", "q35", "-m", "64", "-nodefaults")
    with BareVm(*plain, "-device", device) as vm:
        said = refused(vm.qmp, tmp_path)
        assert "remove the device or option that the reason names" in said
        assert "--for-analysis" in said
        take(vm.qmp, tmp_path, for_analysis=True)
    with BareVm(*plain) as vm:
        take(vm.qmp, tmp_path)


def test_a_device_that_crashes_in_saving_is_left_out(tmp_path: Path) -> None:
    with BareVm("-m", "64", "-device", "pci-serial-2x") as vm:
        assert "start the VM without it" in refused(vm.qmp, tmp_path)
    with BareVm("-m", "64") as vm:
        take(vm.qmp, tmp_path)


def test_a_migration_is_cancelled(tmp_path: Path) -> None:
    with BareVm("-m", "64") as vm, QmpClient.connect(vm.second_qmp) as qmp:
        with socket.create_server(("127.0.0.1", 0)) as sink:
            qmp.execute("migrate-set-parameters", {"max-bandwidth": 100})
            qmp.execute("migrate", {"uri": f"tcp:127.0.0.1:{sink.getsockname()[1]}"})
            assert "cancel it" in refused(vm.qmp, tmp_path, BusyError)
            qmp.execute("migrate_cancel")
            wait_until(lambda: as_map(qmp.execute("query-migrate")).get("status") == "cancelled")
        take(vm.qmp, tmp_path)


def test_a_dump_is_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with BareVm("-m", "64") as vm, QmpClient.connect(vm.second_qmp) as qmp:
            arguments = {"paging": False, "protocol": f"file:{pipe}", "detach": True}
            qmp.execute("dump-guest-memory", arguments)
            with pytest.raises(BusyError, match="dump-running") as busy:
                take(vm.qmp, tmp_path)
            assert "wait for the dump to end" in (busy.value.remedy or "")

            def is_over() -> bool:
                while True:
                    try:
                        if not os.read(reader, 1 << 20):
                            break
                    except BlockingIOError:
                        break
                return as_map(qmp.execute("query-dump")).get("status") == "completed"

            wait_until(is_over)
            wait_until(lambda: as_map(qmp.execute("query-status")).get("status") == "running")
            take(vm.qmp, tmp_path)
    finally:
        os.close(reader)


@pytest.mark.parametrize("remedy", ["echo 0", "mem-merge=off", "--mode stop"])
def test_ksm_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str) -> None:
    switch = tmp_path / "run"
    switch.write_text("1\n")
    monkeypatch.setattr(preflight_host, "KSM_RUN", switch)
    with BareVm("-m", "64") as vm:
        assert remedy in refused(vm.qmp, tmp_path)
        if remedy == "--mode stop":
            take(vm.qmp, tmp_path, mode="stop")
        elif remedy == "echo 0":
            switch.write_text("0\n")
            take(vm.qmp, tmp_path)
    if remedy == "mem-merge=off":
        with BareVm("-m", "64", "-machine", "pc,mem-merge=off") as vm:
            take(vm.qmp, tmp_path)


def test_a_device_that_crashes_in_saving_is_unplugged(tmp_path: Path) -> None:
    has_linux_guest().require()
    with MemoryGuest("-m", "128", "-device", "pci-serial-2x,id=s0") as guest:
        assert "unplug the device" in refused(guest.qmp, tmp_path)
        guest.execute("device_del", id="s0")

        def is_gone() -> bool:
            listed = guest.execute("qom-list", path="/machine/peripheral")
            return "s0" not in {entry["name"] for entry in listed}

        wait_until(is_gone)
        take(guest.qmp, tmp_path)


def test_storage_that_stands_still_is_waited_for(tmp_path: Path) -> None:
    """The BIOS reads the boot sector, and gets it after eight seconds."""
    card = "virtio-blk-pci,drive=slow,cyls=100,heads=16,secs=63"  # else QEMU reads, to guess them
    disk = "driver=null-co,node-name=slow,size=67108864,read-zeroes=on,latency-ns=8000000000"
    with BareVm("-m", "64", "-blockdev", disk, "-device", card) as vm:
        said: list[str] = []

        def is_taken() -> bool:
            try:
                take(vm.qmp, tmp_path, disks="none")
            except RefusedError as error:
                said.append(f"{error}; {error.remedy}")
                return False
            return bool(said)

        wait_until(is_taken)
        assert "stuck-disk-request" in said[0]
        assert "wait until it answers" in said[0]


_FEATURES = 1 << 32 | 1 << 30 | 1 << 26
"""Version 1, protocol features, a log of writes: with them it can be migrated."""
_ANSWERS = {1: _FEATURES, 15: 1 << 1, 17: 1}
"""To GET_FEATURES, GET_PROTOCOL_FEATURES (a log in shared memory), GET_QUEUE_NUM."""


class VhostUserBackend:
    """Answers what QEMU asks before a queue starts (QEMU ``docs/interop/vhost-user.rst``)."""

    def __init__(self, path: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self._server.accept()
            while head := link.recv(12, socket.MSG_WAITALL):
                request, flags, size = struct.unpack("<3I", head)
                payload = link.recv(size, socket.MSG_WAITALL) if size else b""
                if request in _ANSWERS:
                    link.sendall(struct.pack("<3IQ", request, 5, 8, _ANSWERS[request]))
                elif request == 11:  # GET_VRING_BASE
                    link.sendall(struct.pack("<3I", request, 5, 8) + payload[:4] + bytes(4))
                elif flags & 8:  # NEED_REPLY
                    link.sendall(struct.pack("<3IQ", request, 5, 8, 0))

    def close(self) -> None:
        self._server.close()


@pytest.mark.parametrize("remedy", ["a backend inside QEMU", "--mode stop"])
def test_a_vhost_user_backend_is_left_out(tmp_path: Path, remedy: str) -> None:
    memory = "memory-backend-memfd,id=m,size=64M,share=on"
    words = ("-M", "q35,memory-backend=m", "-object", memory, "-m", "64", "-nodefaults")
    card = ("-device", "virtio-net-pci,netdev=n,romfile=")
    with contextlib.closing(VhostUserBackend(tmp_path / "vhost")):
        chardev = ("-chardev", f"socket,id=c,path={tmp_path}/vhost")
        with BareVm(*words, *chardev, "-netdev", "vhost-user,id=n,chardev=c", *card) as vm:
            said = refused(vm.qmp, tmp_path)
            assert "vhost-user" in said
            assert remedy in said
            if remedy == "--mode stop":
                take(vm.qmp, tmp_path, mode="stop")
    if remedy != "--mode stop":
        with BareVm(*words, "-netdev", "user,id=n", *card) as vm:
            take(vm.qmp, tmp_path)
