"""Pre-flight checks whose devices this host does not have, on evidence made up as QEMU gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import pytest

from stillframe.machine import Hindrance
from stillframe.machine.outside import preflight as outside_preflight
from stillframe.machine.outside import preflight_host as outside_host
from stillframe.machine.outside.evidence import Evidence
from stillframe.machine.outside.vm_info import VmInfo
from stillframe.machine.qemu import preflight, preflight_host
from stillframe.machine.qemu.ram_list import RAM_GUEST_MEMFD, RAM_MIGRATABLE, RAM_PROTECTED
from stillframe.model import RamBlock
from stillframe.qmp.client import QmpCommandError

Check = Callable[[Evidence], Iterator[Hindrance]]


class Monitor:
    """Answers from a table; what is not in it is an unknown command."""

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


def evidence(answers: Mapping[str, object] | None = None, **fields: Any) -> Evidence:
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
    return Evidence(**(plain | fields))


def found(check: Check, seen: Evidence) -> dict[str, str]:
    return {hindrance.name: hindrance.severity for hindrance in check(seen)}


PLAIN = {"qom-get type": "pc-q35-7.2-machine"}


@pytest.mark.parametrize("check", preflight.CHECKS, ids=lambda check: check.__name__)
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
    (hindrance,) = preflight_host.vfio(seen)
    assert hindrance.severity == "refuse"
    assert "gpu0" in hindrance.reason
    assert "--mode stop" in hindrance.remedy


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
    (hindrance,) = preflight.confidential(seen)
    assert (hindrance.name, hindrance.severity) == ("confidential-guest", "refuse")
    assert "pc.ram" in hindrance.reason


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
    "status", ["inmigrate", "postmigrate", "finish-migrate", "restore-vm", "save-vm", "colo"]
)
def test_unfit_run_states(status: str) -> None:
    assert found(outside_preflight.run_state, evidence(status=status)) == {"run-state": "refuse"}


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
        {"migration-running": "refuse"} if busy else {}
    )


def test_qemus_own_snapshot_job() -> None:
    def jobs(kind: str, status: str) -> Evidence:
        return evidence({"query-jobs": [{"id": "j", "type": kind, "status": status}]})

    assert found(preflight.snapshot_jobs, jobs("snapshot-save", "running")) == {
        "snapshot-running": "refuse"
    }
    assert found(preflight.snapshot_jobs, jobs("snapshot-save", "concluded")) == {}
    assert found(preflight.snapshot_jobs, jobs("backup", "running")) == {}


def test_every_blocker_is_told() -> None:
    seen = evidence(migration={"blocked-reasons": ["one", "two"]})
    reasons = [hindrance.reason for hindrance in outside_preflight.migration_blockers(seen)]
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
    (hindrance,) = outside_host.file_backed(on_disk)
    assert "/var/ram" in hindrance.reason
    assert "--mode stop" in hindrance.remedy
    assert found(outside_host.file_backed, msgspec.structs.replace(on_disk, mode="stop")) == {}
    template = evidence(blocks=(block(readonly=True, backing="shmem", backing_path="/dev/shm/x"),))
    assert found(outside_host.read_only, template) == {"read-only-ram": "warn"}


def test_refusals_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = evidence(
        PLAIN,
        devices={
            "/machine/peripheral/b": "virtio-balloon-pci",
            "/machine/peripheral/v": "vfio-pci",
        },
    )
    monkeypatch.setattr(outside_host, "process_ids", list)
    names = [h.name for h in outside_preflight.hindrances(seen, preflight.CHECKS)]
    assert names == ["vfio", "balloon"]
