"""The caller's own options: what they take the place of."""

from __future__ import annotations

import pytest

from tests.unit.restore.recorded import Planner

OWN = "/mine/d.qcow2"

REPLACED = [
    # The disk of the same interface, whatever form it was given in.
    (["-drive", "file=/a,if=virtio"], ["-drive", f"file={OWN},if=virtio"], []),
    (["-drive", "file=/a,if=virtio,id=d"], ["-drive", f"file={OWN},if=virtio"], [",id=d"]),
    (["-drive", "file=/a,if=none,id=d"], ["-drive", f"file={OWN},if=none"], [",id=d"]),
    (["-drive", "file=/a"], ["-hda", OWN], []),
    (["-hda", "/a"], ["-drive", f"file={OWN},if=ide,index=0"], []),
    (["-hda", "/a"], ["-drive", f"file={OWN}"], []),
    (["/a"], ["-drive", f"file={OWN}"], []),
    (["/a"], ["-hda", OWN], []),
    (["-cdrom", "/a.iso"], ["-cdrom", OWN], []),
    (["-cdrom", "/a.iso"], ["-drive", f"file={OWN},media=cdrom"], []),
    (["-drive", "file=/a.iso,media=cdrom"], ["-drive", f"file={OWN},media=cdrom"], []),
    (["-pflash", "/a"], ["-drive", f"file={OWN},if=pflash,readonly=on"], []),
    (["-fda", "/a"], ["-drive", f"file={OWN},if=floppy"], []),
    (["-sd", "/a"], ["-sd", OWN], []),
    # The network card keeps what the guest sees of it.
    (
        ["-nic", "user,model=virtio-net-pci,mac=52:54:00:12:34:56"],
        ["-nic", "user,hostfwd=tcp::2222-:22"],
        [",model=virtio-net-pci,mac=52:54:00:12:34:56"],
    ),
    (["-nic", "tap,id=n"], ["-nic", "user"], [",id=n"]),
    (["-net", "nic", "-net", "user"], ["-net", "user,hostfwd=tcp::2222-:22"], []),
    (["-netdev", "user,id=n"], ["-netdev", "user,id=n,hostfwd=tcp::2222-:22"], []),
    # Devices by their driver, files by their kind.
    (["-device", "vfio-pci,host=1"], ["-device", "vfio-pci,host=2"], []),
    (["-device", "usb-redir,chardev=r,id=x"], ["-device", "usb-redir,chardev=r"], [",id=x"]),
    (["-virtfs", "local,path=/a,mount_tag=m,security_model=none"],
     ["-virtfs", "local,path=/b,mount_tag=m,security_model=none"], []),
    (["-fw_cfg", "name=opt/x,file=/a"], ["-fw_cfg", "name=opt/x,file=/b"], []),
    (["-smbios", "type=1,serial=a"], ["-smbios", "type=1,serial=b"], []),
    (["-acpitable", "file=/a"], ["-acpitable", "file=/b"], []),
    (["-set", "device.v.x=1"], ["-set", "device.v.x=2"], []),
    (["-readconfig", "/a"], ["-readconfig", "/b"], []),
    (["-object", "secret,id=s,file=/a"], ["-object", "secret,id=s,data=x"], []),
]  # fmt: skip


@pytest.mark.parametrize(("recorded", "own", "carried"), REPLACED, ids=lambda w: " ".join(w))
def test_it_takes_the_place(
    planner: Planner, recorded: list[str], own: list[str], carried: list[str]
) -> None:
    plan = planner.plan(*recorded, extra=own)
    words = " ".join(planner.words(*recorded, extra=own))
    assert "".join([own[-1].split(",")[-1], *carried]) in words
    assert "/a" not in words
    assert not plan.refusals
    assert not plan.overlays
    assert not [note for note in plan.notes if "added" in note]


def test_the_first_is_the_first_and_the_second_the_second(planner: Planner) -> None:
    recorded = [f"-drive file=/{name},if=virtio,format=raw" for name in "abc"]
    argv = [word for line in recorded for word in line.split()]
    words = planner.words(
        *argv, extra=["-drive", "file=/1,if=virtio", "-drive", "file=/2,if=virtio"]
    )
    assert words[1] == "file=/1,if=virtio"
    assert words[3] == "file=/2,if=virtio"
    assert "disk0.qcow2" in words[5]


def test_a_disk_is_not_taken_for_a_cdrom(planner: Planner) -> None:
    argv = ["-hda", "/disk", "-cdrom", "/a.iso"]
    words = planner.words(*argv, extra=["-drive", "file=/b.iso,media=cdrom"])
    assert "disk0.qcow2" in words[1]
    assert words[3].startswith("file=/b.iso,media=cdrom")
    assert len(words) == 4


@pytest.mark.parametrize(
    ("recorded", "own"),
    [
        (["-drive", "file=/a,if=none,id=d"], ["-drive", "file=/b,if=none,id=new"]),
        (["-drive", "file=/a,if=virtio"], ["-drive", "file=/b,if=scsi"]),
        (["-device", "edu"], ["-device", "edu,id=new"]),
        (["-nic", "none"], ["-device", "e1000"]),
    ],
    ids=lambda w: " ".join(w),
)
def test_what_has_no_place_is_added_and_said(
    planner: Planner, recorded: list[str], own: list[str]
) -> None:
    plan = planner.plan(*recorded, extra=own)
    assert own[1] in plan.argv
    assert any("takes the place of no recorded option" in note for note in plan.notes)


def test_nodes_below_a_replaced_one_are_left_out(planner: Planner) -> None:
    """Else the file that is gone would be asked for still."""
    argv = ["-blockdev", "driver=file,filename=/gone,node-name=s"]
    argv += ["-blockdev", "driver=qcow2,file=s,node-name=f", "-device", "virtio-blk-pci,drive=f"]
    own = ["-blockdev", "driver=qcow2,node-name=f,file.driver=file,file.filename=/here"]
    plan = planner.plan(*argv, extra=own)
    assert not any("/gone" in word for word in plan.argv)
    assert not any(touch.target == "/gone" for touch in plan.touches)
    assert not plan.overlays
