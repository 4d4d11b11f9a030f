"""Pre-flight checks whose devices this host does not have, on evidence made up as QEMU gives it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stillframe.kernel.proc_maps import read_maps
from stillframe.machine import Blocker
from stillframe.machine.process import preflight as outside_preflight
from stillframe.machine.process import preflight_host as outside_host
from stillframe.machine.process.inspection import Inspection
from stillframe.machine.process.vm_info import VmInfo
from stillframe.machine.qemu import preflight, preflight_host
from stillframe.machine.qemu.ram_list import RAM_GUEST_MEMFD, RAM_MIGRATABLE, RAM_PROTECTED
from stillframe.model import RamBlock
from stillframe.qmp.command import QmpCommandError

Check = Callable[[Inspection], Iterator[Blocker]]


class Monitor:
    """Answers from a table; what is not in it is an unknown command."""

    version = (7, 2, 22)

    def __init__(self, answers: Mapping[str, object]) -> None:
        self._answers = answers

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        key = command
        if arguments:
            key += " " + str(arguments.get("property") or arguments.get("path"))
        if key not in self._answers:
            raise QmpCommandError(command, "CommandNotFound", "no such command")
        return self._answers[key]

    def hmp(self, line: str) -> str:
        return str(self._answers.get(line, ""))


def evidence(answers: Mapping[str, object] | None = None, **fields: Any) -> Inspection:
    monitor: Any = Monitor({"query-target": {"arch": "x86_64"}} | dict(answers or {}))
    info = VmInfo(
        pid=1,
        started_s=0,
        uid=0,
        name="vm",
        executable="/usr/bin/qemu-system-x86_64",
        argv=("qemu-system-x86_64",),
        accelerator="tcg",
        ram_bytes=1 << 20,
        qmp_addresses=(),
    )
    plain: dict[str, Any] = {
        "mode": "background",
        "info": info,
        "qmp": monitor,
        "status": "running",
        "migration": {},
        "blocks": (),
        "ram_flags": {"pc.ram": RAM_MIGRATABLE},
        "ram_vmas": (),
        "fd_targets": frozenset({"socket:[1]", "/dev/kvm", "anon_inode:kvm-vm", "/dev/vhost-net"}),
        "devices": {"/machine/peripheral/net0": "virtio-net-pci"},
    }
    return Inspection(**(plain | fields))


def found(check: Check, seen: Inspection) -> dict[str, str]:
    return {blocker.name: blocker.severity for blocker in check(seen)}


PLAIN = {"qom-get type": "pc-q35-7.2-machine"}
MEMFD_BLOCK = RamBlock(
    idstr="m0",
    hva=1 << 30,
    used_length_bytes=1 << 20,
    max_length_bytes=1 << 20,
    page_size_bytes=4096,
    backing="memfd",
    shared=True,
    backing_fd=3,
)


@pytest.mark.parametrize("check", preflight.CHECKS["first"], ids=lambda check: check.__name__)
def test_a_plain_machine_has_no_hindrance(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_host, "process_ids", list)
    assert found(check, evidence(PLAIN)) == {}


@pytest.mark.parametrize(
    "target",
    [
        "/dev/vfio/vfio",
        "/dev/vfio/42",
        "/dev/iommu",
        "anon_inode:kvm-vfio",
        "anon_inode:[vfio-device]",
    ],
)
def test_vfio_by_descriptor(target: str) -> None:
    seen = evidence(fd_targets=frozenset({target}))
    assert found(preflight_host.vfio, seen) == {"vfio": "refuse"}
    assert found(preflight_host.vfio, msgspec.structs.replace(seen, mode="stop")) == {
        "vfio": "warn"
    }


@pytest.mark.parametrize("kind", ["vfio-pci", "vfio-user-pci", "vfio-pci-nohotplug"])
def test_vfio_by_device(kind: str) -> None:
    seen = evidence(devices={"/machine/peripheral/gpu0": kind})
    (blocker,) = preflight_host.vfio(seen)
    assert blocker.severity == "refuse"
    assert "gpu0" in blocker.reason
    assert blocker.remedy == "unplug the device"  # mode stop is refused: it blocks migration


def test_vhost_user_by_device_and_by_network() -> None:
    device = evidence(devices={"/machine/peripheral/fs": "vhost-user-fs-pci"})
    assert found(preflight_host.vhost_user, device) == {"vhost-user": "refuse"}
    network = evidence({"info network": "n0: index=0,type=vhost-user,vhost-user0 to c0"})
    assert found(preflight_host.vhost_user, network) == {"vhost-user": "refuse"}
    named = evidence({"info network": "vhost-user0: index=0,type=tap,ifname=tap0"})
    assert found(preflight_host.vhost_user, named) == {}


def test_vdpa_and_rdma() -> None:
    vdpa = evidence(fd_targets=frozenset({"/dev/vhost-vdpa-0"}), mode="stop")
    assert found(preflight_host.vhost_vdpa, vdpa) == {"vhost-vdpa": "refuse"}
    rdma = evidence(fd_targets=frozenset({"/dev/infiniband/uverbs0"}))
    assert found(preflight_host.rdma, rdma) == {"rdma": "refuse"}
    assert found(preflight_host.rdma, evidence(devices={"/x/r": "pvrdma"})) == {"rdma": "refuse"}


@pytest.mark.parametrize("flag", [RAM_PROTECTED, RAM_GUEST_MEMFD])
def test_protected_memory(flag: int) -> None:
    seen = evidence(ram_flags={"pc.ram": RAM_MIGRATABLE | flag}, mode="stop")
    (blocker,) = preflight.confidential(seen)
    assert (blocker.name, blocker.severity) == ("confidential-guest", "refuse")
    assert "pc.ram" in blocker.reason


@pytest.mark.parametrize(
    "answers",
    [
        {"query-sev": {"enabled": True}},
        {"qom-get confidential-guest-support": "/objects/tdx0"},
    ],
)
def test_confidential_guests(answers: dict[str, object]) -> None:
    assert found(preflight.confidential, evidence(answers)) == {"confidential-guest": "refuse"}
    off: dict[str, object] = {
        "query-sev": {"enabled": False},
        "qom-get confidential-guest-support": "",
    }
    assert found(preflight.confidential, evidence(off)) == {}


@pytest.mark.parametrize("arch", ["aarch64", "arm", "ppc64", "s390x", "mips64el", "sparc64", "?"])
def test_other_architectures(arch: str) -> None:
    seen = evidence({"query-target": {"arch": arch}})
    assert found(preflight.target, seen) == {"target-architecture": "refuse"}


def test_xen() -> None:
    seen = evidence({"qom-get type": "xenfv-4.2-machine"})
    assert found(preflight.xen, seen) == {"xen": "refuse"}


@pytest.mark.parametrize(
    ("status", "severity"),
    [("inmigrate", "refuse"), ("postmigrate", "refuse"), ("save-vm", "busy"), ("colo", "refuse"),
     ("finish-migrate", "busy"), ("restore-vm", "busy")],
)  # fmt: skip
def test_unfit_run_states(status: str, severity: str) -> None:
    assert found(outside_preflight.run_state, evidence(status=status)) == {"run-state": severity}


@pytest.mark.parametrize("status", ["running", "paused", "prelaunch", "io-error", "suspended"])
def test_fit_run_states(status: str) -> None:
    assert found(outside_preflight.run_state, evidence(status=status)) == {}


@pytest.mark.parametrize(
    ("status", "busy"),
    [
        ("none", False), ("completed", False), ("failed", False), ("cancelled", False),
        ("setup", True), ("active", True), ("cancelling", True), ("device", True),
        ("pre-switchover", True), ("postcopy-active", True), ("postcopy-paused", True),
        ("wait-unplug", True), ("colo", True), ("a-state-of-the-future", True),
    ],
)  # fmt: skip
def test_migration_states(status: str, busy: bool) -> None:
    seen = evidence(migration={"status": status})
    assert found(outside_preflight.migration_running, seen) == (
        {"migration-running": "busy"} if busy else {}
    )


def test_qemus_own_snapshot_job() -> None:
    def jobs(kind: str, status: str) -> Inspection:
        return evidence({"query-jobs": [{"id": "j", "type": kind, "status": status}]})

    assert found(preflight.snapshot_jobs, jobs("snapshot-save", "running")) == {
        "snapshot-running": "busy"
    }
    assert found(preflight.snapshot_jobs, jobs("snapshot-save", "concluded")) == {}
    assert found(preflight.snapshot_jobs, jobs("backup", "running")) == {}


def test_a_dump() -> None:
    active = evidence({"query-dump": {"status": "active", "completed": 1, "total": 2}})
    assert found(outside_preflight.dump, active) == {"dump-running": "busy"}
    done = evidence({"query-dump": {"status": "completed", "completed": 2, "total": 2}})
    assert found(outside_preflight.dump, done) == {}


def test_a_mounted_9p_file_system_is_to_be_unmounted() -> None:
    """In QEMU's words (``hw/9pfs/9p.c``: v9fs_attach)."""
    why = (
        "Migration is disabled when VirtFS export path '/srv/it' is mounted in the guest using"
        " mount_tag 'host'"
    )
    (blocker,) = outside_preflight.migration_blockers(
        evidence(migration={"blocked-reasons": [why]})
    )
    assert blocker.severity == "refuse"
    assert blocker.remedy.startswith("unmount the guest's 9p file system of /srv/it, ")


def test_every_blocker_is_told() -> None:
    seen = evidence(migration={"blocked-reasons": ["one", "two"]})
    reasons = [blocker.reason for blocker in outside_preflight.migration_blockers(seen)]
    assert len(reasons) == 2
    assert reasons[0].endswith("one")


def test_memory_devices() -> None:
    def device(kind: str, **data: object) -> dict[str, object]:
        return {"type": kind, "data": data}

    answers = {"query-memory-devices": [device("dimm", id="d"), device("nvdimm", id="n")]}
    assert found(preflight.virtio_mem, evidence(answers)) == {"persistent-memory": "warn"}
    changing = device("virtio-mem", id="v") | {"data": {"size": 0, "requested-size": 1}}
    seen = evidence({"query-memory-devices": [changing]})
    assert found(preflight.virtio_mem, seen) == {"virtio-mem": "refuse"}


def block(**fields: Any) -> RamBlock:
    plain: dict[str, Any] = {
        "idstr": "m0",
        "hva": 0x10000,
        "used_length_bytes": 4096,
        "max_length_bytes": 4096,
        "page_size_bytes": 4096,
    }
    return RamBlock(**(plain | fields))


def test_files_and_read_only_blocks() -> None:
    on_disk = evidence(blocks=(block(backing="file", backing_path="/var/ram"), block()))
    (blocker,) = outside_host.file_backed(on_disk)
    assert "/var/ram" in blocker.reason
    assert "--mode stop" in blocker.remedy
    assert found(outside_host.file_backed, msgspec.structs.replace(on_disk, mode="stop")) == {}
    template = evidence(blocks=(block(readonly=True, backing="shmem", backing_path="/dev/shm/x"),))
    assert found(outside_host.read_only, template) == {"read-only-ram": "warn"}


def test_pages_that_the_host_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(outside_host, "KSM_RUN", run)
    info = msgspec.structs.replace(evidence().info, pid=os.getpid())

    def seen(memory: mmap.mmap, **fields: Any) -> dict[str, str]:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vmas = tuple(vma for vma in read_maps(os.getpid()).vmas if vma.start <= start < vma.end)
        return found(outside_host.merged, evidence(info=info, ram_vmas=vmas, **fields))

    ram = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert seen(ram) == {}  # a kernel without KSM
    run.write_text("1\n")
    ram.madvise(mmap.MADV_UNMERGEABLE)
    assert seen(ram) == {}
    ram.madvise(mmap.MADV_MERGEABLE)
    assert seen(ram) == {"ksm": "refuse"}
    assert outside_host.merged in outside_host.WRITERS  # also when it is switched on meanwhile
    assert seen(ram, mode="stop") == {}
    for idle in ("0\n", "2\n"):
        run.write_text(idle)
        assert seen(ram) == {}


def test_refusals_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = evidence(
        PLAIN,
        blocks=(MEMFD_BLOCK,),
        devices={
            "/machine/peripheral/b": "virtio-balloon-pci",
            "/machine/peripheral/v": "vfio-pci",
        },
    )
    monkeypatch.setattr(outside_host, "process_ids", list)
    names = [h.name for h in outside_preflight.blockers(seen, preflight.CHECKS["first"])]
    assert names == ["vfio", "balloon"]
