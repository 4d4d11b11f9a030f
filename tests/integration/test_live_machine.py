"""What is taken is the machine of the instant: devices plugged in and out, media, overlays."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stillframe.machine.finding import connect
from stillframe.qmp.client import QmpClient
from stillframe.qmp.command import QmpCommandError
from tests.support.bare_vm import BareVm
from tests.support.both_qemus import both_qemus  # noqa: F401 - a fixture
from tests.support.round_trip import RoundTrip, devices, media, round_trip, take_machine
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("both_qemus")]
MIB = 1 << 20


def image(path: Path, kind: str = "qcow2", size: str = "8M", backing: Path | None = None) -> Path:
    base = ["-b", str(backing), "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *base, path, size], check=True)
    return path


class Monitor:
    """Does things to the VM before it is taken."""

    def __init__(self, vm: BareVm) -> None:
        self._qmp = QmpClient.connect(vm.qmp, timeout_s=60)

    def __call__(self, command: str, **arguments: Any) -> Any:
        return self._qmp.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def hmp(self, line: str) -> str:
        return self._qmp.hmp(line)

    def unplug(self, device: str) -> None:
        """The guest's part is played by a reset, on which QEMU removes what was asked for."""
        self("device_del", id=device)
        self("system_reset")

        def is_gone() -> bool:
            plugged = self("qom-list", path="/machine/peripheral")
            return device not in [item["name"] for item in plugged]

        wait_until(is_gone, f"{device} stays")

    def close(self) -> None:
        self._qmp.close()


def changed(vm: BareVm, *steps: Any) -> None:
    monitor = Monitor(vm)
    try:
        for step in steps:
            step(monitor)
    finally:
        monitor.close()


def assert_same(vm: BareVm, trip: RoundTrip) -> None:
    """The new VM has what the old one has, and goes on."""
    with connect(vm.qmp) as old:
        assert devices(trip.new) == devices(old)
        assert media(trip.new) == media(old)
    assert trip.new.status() == "running"
    assert not [note for note in trip.taken.notes if not note.startswith("disks: ")]


ROOTS = ("-M", "q35", "-device", "pcie-root-port,id=rp1,chassis=1", "-device")
ROOTS = (*ROOTS, "pcie-root-port,id=rp2,chassis=2")


def test_a_hotplugged_nic_comes_back(tmp_path: Path) -> None:
    with BareVm("-nodefaults", "-m", "64") as vm:
        changed(vm, lambda m: m.hmp("device_add virtio-net-pci,id=hot"))
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)


def test_a_nic_with_its_back_end_and_address(tmp_path: Path) -> None:
    def plug(m: Monitor) -> None:
        m("netdev_add", type="user", id="n0")
        m("device_add", driver="e1000e", id="hot", netdev="n0", bus="rp2", mac="52:54:00:00:00:77")

    with BareVm("-nodefaults", *ROOTS, "-m", "64") as vm:
        changed(vm, plug)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            text = trip.new.qmp.hmp("info network")
            assert "52:54:00:00:00:77" in text
            assert "n0: index=0,type=user" in text


def test_a_hotplugged_disk_and_dimm(tmp_path: Path) -> None:
    disk = image(tmp_path / "hot.qcow2")

    def plug(m: Monitor) -> None:
        file = {"driver": "file", "filename": str(disk)}
        m("blockdev-add", driver="qcow2", node_name="hd", file=file)
        m("device_add", driver="virtio-blk-pci", id="hot", drive="hd", bus="rp1")
        m("object-add", qom_type="memory-backend-ram", id="m1", size=64 * MIB)
        m("device_add", driver="pc-dimm", id="dimm1", memdev="m1")

    with BareVm("-nodefaults", *ROOTS, "-m", "64,slots=4,maxmem=1G") as vm:
        changed(vm, plug)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert trip.new.qmp.execute("query-memory-devices") != []


def test_an_unplugged_nic_stays_away(tmp_path: Path) -> None:
    nics = ("-netdev", "user,id=a", "-device", "virtio-net-pci,id=na,netdev=a")
    nics += ("-device", "virtio-net-pci,id=nb,mac=52:54:00:00:00:99")

    def unplug(m: Monitor) -> None:
        m.unplug("na")
        m("netdev_del", id="a")

    disk = image(tmp_path / "d.qcow2")
    drive = ("-drive", f"file={disk},if=virtio")
    with BareVm("-nodefaults", *nics, *drive, "-m", "64") as vm:
        changed(vm, unplug)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert not any("id=na" in word for word in trip.record.command_line)


@pytest.mark.parametrize("unplugs", [False, True])
def test_devices_that_other_options_make(tmp_path: Path, unplugs: bool) -> None:
    """They are no plugged ones; and they keep their addresses when one before them has gone."""
    shared = ("-virtfs", f"local,path={tmp_path},mount_tag=v,security_model=none")
    nic = ("-device", "virtio-net-pci,id=na")
    with BareVm("-nodefaults", *nic, *shared, "-debugcon", "null", "-m", "64") as vm:
        if unplugs:
            changed(vm, lambda m: m.unplug("na"))
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert ("-virtfs" in (trip.record.command_line or trip.record.argv)) != unplugs


def test_a_nic_replugged_under_the_same_id(tmp_path: Path) -> None:
    def replug(m: Monitor) -> None:
        m.unplug("n")
        m("device_add", driver="virtio-net-pci", id="n", mac="52:54:00:00:00:42", bus="rp2")

    nic = ("-device", "virtio-net-pci,id=n,mac=52:54:00:00:00:41,bus=rp1")
    with BareVm("-nodefaults", *ROOTS, *nic, "-m", "64") as vm:
        changed(vm, replug)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert "52:54:00:00:00:42" in trip.new.qmp.hmp("info network")


def scsi_disk(m: Monitor, directory: Path) -> None:
    file = {"driver": "file", "filename": str(image(directory / "s.qcow2"))}
    m("blockdev-add", driver="qcow2", node_name="s", file=file)
    m("device_add", driver="scsi-hd", id="hot", bus="sc.0", drive="s", lun=3, serial="S, 7")


def drive_of_the_human_monitor(m: Monitor, directory: Path) -> None:
    disk = image(directory / "h.qcow2")
    assert "OK" in m.hmp(f"drive_add 0 if=none,id=hd,file={disk}")
    m("device_add", driver="virtio-blk-pci", id="hot", drive="hd")


def serial_port(m: Monitor, directory: Path) -> None:
    m("chardev-add", id="c", backend={"type": "ringbuf", "data": {"size": 4096}})
    m("device_add", driver="virtserialport", id="hot", bus="vs.0", chardev="c", name="org.x")


def random_source(m: Monitor, directory: Path) -> None:
    m("object-add", qom_type="rng-random", id="r", filename="/dev/urandom")
    m("device_add", driver="virtio-rng-pci", id="hot", rng="r", max_bytes=1024, period=1000)


def tablet(m: Monitor, directory: Path) -> None:
    m("device_add", driver="usb-kbd", id="first")
    m("device_add", driver="usb-tablet", id="hot")


def iothread_disk(m: Monitor, directory: Path) -> None:
    m("object-add", qom_type="iothread", id="io")
    m("blockdev-add", driver="null-co", node_name="n", read_zeroes=True)
    file = {"driver": "file", "filename": str(image(directory / "i.raw", "raw"))}
    m("blockdev-add", driver="raw", node_name="s", file=file)
    m("device_add", driver="virtio-blk-pci", id="hot", drive="s", iothread="io")


def processor(m: Monitor, directory: Path) -> None:
    slots = [slot for slot in m("query-hotpluggable-cpus") if "qom-path" not in slot]
    slot = slots[0]
    props = slot["props"]
    m("device_add", driver=slot["type"], id="hot", **props)


def a_bridge_and_what_is_on_it(m: Monitor, directory: Path) -> None:
    m.hmp("device_add pci-bridge,id=br,chassis_nr=5")
    m("device_add", driver="e1000", id="aa", bus="br", addr="4")


def memory_in_a_memfd(m: Monitor, directory: Path) -> None:
    m("object-add", qom_type="memory-backend-memfd", id="m1", size=128 * MIB, share=True)
    m("device_add", driver="pc-dimm", id="d1", memdev="m1")
    m("object-add", qom_type="memory-backend-ram", id="m2", size=128 * MIB)
    m("device_add", driver="pc-dimm", id="d2", memdev="m2")


def without_id(m: Monitor, directory: Path) -> None:
    m("device_add", driver="virtio-net-pci", mac="52:54:00:00:01:02")


PLUGGED = (
    scsi_disk,
    drive_of_the_human_monitor,
    serial_port,
    random_source,
    tablet,
    iothread_disk,
    processor,
    a_bridge_and_what_is_on_it,
    memory_in_a_memfd,
    without_id,
)


@pytest.mark.parametrize("plug", PLUGGED, ids=lambda plug: plug.__name__)
@pytest.mark.parametrize("form", ["plain", "json"])
def test_other_things_plugged_in(tmp_path: Path, plug: Any, form: str) -> None:
    devices_ = ["virtio-scsi-pci,id=sc", "virtio-serial-pci,id=vs", "qemu-xhci,id=x"]
    if form == "json":
        devices_ = [
            '{"driver":"virtio-scsi-pci","id":"sc"}',
            '{"driver":"virtio-serial-pci","id":"vs"}',
            '{"driver":"qemu-xhci","id":"x"}',
        ]
    options = [word for device in devices_ for word in ("-device", device)]
    memory = ("-m", "64,slots=4,maxmem=1G", "-smp", "1,maxcpus=4")
    with BareVm("-nodefaults", *options, *memory) as vm:
        changed(vm, lambda m: plug(m, tmp_path))
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            with connect(vm.qmp) as old:
                assert trip.new.qmp.hmp("info qtree").count("dev: ") == old.qmp.hmp(
                    "info qtree"
                ).count("dev: ")


def test_a_machine_as_it_was_started_keeps_its_command_line(tmp_path: Path) -> None:
    disk = image(tmp_path / "d.qcow2")
    options = ["-nodefaults", "-m", "64", "-drive", f"file={disk},if=virtio,readonly", "-device"]
    options += ["virtio-net,netdev=n", "-netdev", "user,id=n", "--device", "virtio-rng-pci"]
    options += ["-device", '{"driver":"e1000", "id":"e"}', "-device", "virtio-rng-pci", "-usb"]
    with BareVm(*options) as vm, connect(vm.qmp) as machine:
        record = machine.describe()
        assert record.command_line == ()  # so that the manifest has one line, not two alike


@pytest.fixture
def discs(tmp_path: Path) -> tuple[Path, Path]:
    return image(tmp_path / "a.iso", "raw", "2M"), image(tmp_path / "b.iso", "raw", "2M")


CD_FORMS = {
    "cdrom": lambda iso: ("-cdrom", str(iso)),
    "drive": lambda iso: ("-drive", f"file={iso},media=cdrom"),
    "id": lambda iso: (
        "-drive",
        f"if=none,id=cd,file={iso},media=cdrom",
        "-device",
        "ide-cd,drive=cd,id=dev",
    ),
    "blockdev": lambda iso: (
        "-blockdev",
        f"driver=raw,node-name=n,read-only=on,file.driver=file,file.filename={iso}",
        "-device",
        "ide-cd,drive=n,id=dev",
    ),
}


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("form", CD_FORMS)
def test_a_changed_cd(tmp_path: Path, discs: tuple[Path, Path], form: str, machine: str) -> None:
    first, second = discs

    def change(m: Monitor) -> None:
        if m("query-block")[0].get("qdev") == "dev":
            m("blockdev-change-medium", id="dev", filename=str(second), format="raw")
        else:
            name = m("query-block")[0]["device"]
            m("blockdev-change-medium", device=name, filename=str(second), format="raw")

    with BareVm("-nodefaults", "-M", machine, *CD_FORMS[form](first), "-m", "64") as vm:
        changed(vm, change)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert str(second) in str(media(trip.new))
            assert str(first) not in str(media(trip.new))


@pytest.mark.parametrize("form", CD_FORMS)
def test_an_ejected_cd(tmp_path: Path, discs: tuple[Path, Path], form: str) -> None:
    def eject(m: Monitor) -> None:
        entry = m("query-block")[0]
        m.hmp(f"eject -f {entry['device'] or 'dev'}")

        def is_out() -> bool:
            if not m("query-block")[0].get("inserted"):
                return True
            with contextlib.suppress(QmpCommandError):  # its firmware may close the tray again
                m("blockdev-open-tray", id="dev", force=True)
                m("blockdev-remove-medium", id="dev")
            return False

        wait_until(is_out)

    with BareVm("-nodefaults", *CD_FORMS[form](discs[0]), "-m", "64") as vm:
        changed(vm, eject)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert str(discs[0]) not in str(media(trip.new))


def test_a_cd_in_the_drive_that_the_machine_has_of_itself(
    tmp_path: Path, discs: tuple[Path, Path]
) -> None:
    with BareVm("-m", "64") as vm:
        changed(vm, lambda m: m.hmp(f"change ide1-cd0 {discs[0]}"))
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            assert str(discs[0]) in str(media(trip.new))


DISK_FORMS = {
    "drive": lambda disk: ("-drive", f"file={disk},if=virtio"),
    "hda": lambda disk: ("-hda", str(disk)),
    "bare": lambda disk: (str(disk),),
    "id": lambda disk: ("-drive", f"if=none,id=d,file={disk}", "-device", "ide-hd,drive=d,id=dev"),
    "blockdev": lambda disk: (
        "-blockdev",
        f"driver=file,node-name=f,filename={disk}",
        "-blockdev",
        "driver=qcow2,node-name=d,file=f",
        "-device",
        "virtio-blk-pci,drive=d,id=dev",
    ),
}


@pytest.mark.parametrize("form", DISK_FORMS)
def test_a_disk_on_an_overlay(tmp_path: Path, form: str) -> None:
    base, overlay = image(tmp_path / "base.qcow2"), tmp_path / "over.qcow2"

    def snapshot(m: Monitor) -> None:
        entry = m("query-block")[0]
        node = {"node_name": "d", "snapshot_node_name": "ov"}
        how = {"device": entry["device"]} if entry["device"] else node
        m("blockdev-snapshot-sync", **how, snapshot_file=str(overlay), format="qcow2")

    with BareVm("-nodefaults", *DISK_FORMS[form](base), "-m", "64") as vm:
        changed(vm, snapshot)
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)
            [disk] = trip.record.disks
            assert [i.filename for i in disk.images] == [str(overlay), str(base)]
            assert [i.format for i in disk.images] == ["qcow2", "qcow2"]
            assert [i.read_only for i in disk.images] == [False, True]
            assert disk.images[0].size_bytes == 8 * MIB


@pytest.mark.parametrize("form", ["drive", "id"])
def test_a_temporary_overlay(tmp_path: Path, form: str) -> None:
    base = image(tmp_path / "base.qcow2")
    options = ("-nodefaults", "-snapshot", *DISK_FORMS[form](base), "-m", "64")
    with BareVm(*options) as vm, round_trip(vm.qmp, tmp_path) as trip:
        [disk] = trip.record.disks
        assert disk.temporary
        assert disk.filename == str(base)
        assert devices(trip.new) == ({"dev": "child<ide-hd>"} if form == "id" else {})
        [note] = trip.taken.notes
        assert "snapshot=on" in note
        assert disk.device in note


def job_done(m: Monitor, job: str) -> None:
    """Complete a block job once it is ready, and wait for its end."""

    def status() -> str:
        return next((one["status"] for one in m("query-jobs") if one["id"] == job), "ended")

    wait_until(lambda: status() in ("ready", "ended"), f"job {job} does not get ready")
    if status() == "ready":
        m("job-complete", id=job)
    wait_until(lambda: status() == "ended", f"job {job} does not end")


def to_a_mirror(m: Monitor, directory: Path) -> None:
    target = {"driver": "file", "filename": str(image(directory / "mirror.qcow2"))}
    m("blockdev-add", driver="qcow2", node_name="target", file=target)
    m("blockdev-mirror", job_id="j", device="d", target="target", sync="full")
    job_done(m, "j")


def to_the_base(m: Monitor, directory: Path) -> None:
    m("block-commit", job_id="j", device="d")
    job_done(m, "j")


def without_a_base(m: Monitor, directory: Path) -> None:
    m("block-stream", job_id="j", device="d")
    job_done(m, "j")


def two_overlays(m: Monitor, directory: Path) -> None:
    for name, below in (("one", "d"), ("two", "one")):
        file = str(directory / f"{name}.qcow2")
        how = {"node_name": below, "snapshot_node_name": name, "snapshot_file": file}
        m("blockdev-snapshot-sync", **how, format="qcow2")


def an_overlay_that_does_not_name_its_base(m: Monitor, directory: Path) -> None:
    file = {"driver": "file", "filename": str(image(directory / "bare.qcow2"))}
    m("blockdev-add", driver="qcow2", node_name="bare", file=file, backing=None)
    m("blockdev-snapshot", node="d", overlay="bare")


CHAINS = (
    to_a_mirror,
    to_the_base,
    without_a_base,
    two_overlays,
    an_overlay_that_does_not_name_its_base,
)


@pytest.mark.parametrize("change", CHAINS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("explicit", [False, True])
def test_other_changes_of_a_chain(tmp_path: Path, change: Any, explicit: bool) -> None:
    throttled = change in (two_overlays, an_overlay_that_does_not_name_its_base) and not explicit
    base = image(tmp_path / "base.qcow2")
    top = image(tmp_path / "top.qcow2", backing=base)
    below = [f"driver=qcow2,node-name=b,file.driver=file,file.filename={base}"] if explicit else []
    backing = ",backing=b" if explicit else ""
    nodes = [*below, f"driver=qcow2,node-name=d,file.driver=file,file.filename={top}{backing}"]
    drive = "d"
    options = [word for node in nodes for word in ("-blockdev", node)]
    if throttled:
        options += ["-object", "throttle-group,id=g,x-iops-total=1000"]
        options += ["-blockdev", "driver=throttle,node-name=t,throttle-group=g,file=d"]
        drive = "t"
    options += ["-device", f"virtio-blk-pci,drive={drive},id=dev"]
    with BareVm("-nodefaults", *options, "-m", "64") as vm:
        changed(vm, lambda m: change(m, tmp_path))
        with round_trip(vm.qmp, tmp_path) as trip:
            assert_same(vm, trip)


@pytest.mark.parametrize("job", ["blockdev-backup", "blockdev-mirror"])
def test_a_block_job_changes_no_disk(tmp_path: Path, job: str) -> None:
    """Its filter is on top of the drive's node as long as it runs: also when we copy disks."""
    base = image(tmp_path / "base.qcow2")
    top = image(tmp_path / "top.qcow2", backing=base)
    target = {"driver": "file", "filename": str(image(tmp_path / "target.qcow2"))}
    chain = f"driver=qcow2,node-name=d,file.driver=file,file.filename={top}"
    device = "virtio-blk-pci,drive=d,id=dev"
    with BareVm("-nodefaults", "-blockdev", chain, "-device", device, "-m", "64") as vm:
        with connect(vm.qmp) as machine:
            before = machine.describe()
            assert before.command_line == ()
        start = {"job_id": "j", "device": "d", "target": "target", "sync": "full", "speed": 1}
        changed(
            vm,
            lambda m: m("blockdev-add", driver="qcow2", node_name="target", file=target),
            lambda m: m(job, **start),
        )
        with connect(vm.qmp) as machine:
            assert machine.qmp.execute("query-jobs")
            assert machine.describe() == before


def test_a_device_that_comes_at_about_the_instant_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BareVm("-nodefaults", "-m", "64") as vm, connect(vm.qmp) as machine:
        stop = machine.stop

        def plug_and_stop() -> None:
            machine.qmp.execute("device_add", {"driver": "usb-ehci", "id": "late"})
            stop()

        monkeypatch.setattr(machine, "stop", plug_and_stop)
        assert take_machine(machine, tmp_path / "x.still").notes == (
            "devices or media changed at about the instant: check them",
        )


@pytest.mark.parametrize("what", ["limits", "nic"])
def test_what_no_option_says_is_noted(tmp_path: Path, what: str) -> None:
    disk = image(tmp_path / "d.qcow2")
    options = ("-drive", f"file={disk},if=virtio", "-nic", "user,model=virtio-net-pci", "-smp", "2")

    def change(m: Monitor) -> None:
        if what == "limits":
            m.hmp("block_set_io_throttle virtio0 0 0 0 100 0 0")
        else:
            entries = m("qom-list", path="/machine/unattached")
            [nic] = [e["name"] for e in entries if e["type"] == "child<virtio-net-pci>"]
            m("device_del", id=f"/machine/unattached/{nic}")
            m("system_reset")
            wait_until(lambda: "type=nic" not in m.hmp("info network"), "the card stays")

    with BareVm("-nodefaults", *options, "-m", "64") as vm:
        changed(vm, change)
        with connect(vm.qmp) as machine:
            [note] = machine.describe().differences
    assert {"limits": "I/O limits", "nic": "network card(s) of -nic"}[what] in note
