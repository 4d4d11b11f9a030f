"""VMs that are not where their command line says: daemonized, chrooted, with a file of options, or
without a QMP monitor."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.qemu import qemu_binary
from stillframe.errors import MachineError, UsageError
from stillframe.machine.finding import connect, find_vm
from stillframe.store import open_snapshot
from tests.support.bare_vm import BareVm
from tests.support.both_qemus import both_qemus  # noqa: F401 - a fixture
from tests.support.human import human
from tests.support.listening import wait_listening
from tests.support.round_trip import round_trip, take_machine
from tests.support.taking import command

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("both_qemus")]
_DAEMON = "-display none -nodefaults -m 64 -accel tcg -daemonize -pidfile pid"


@contextlib.contextmanager
def daemon(directory: Path, *options: str) -> Iterator[int]:
    """A daemonized QEMU, started in ``directory``; its pid."""
    pidfile = directory / "pid"
    subprocess.run(
        [
            qemu_binary(),
            *_DAEMON.split(),
            *options,
        ],
        cwd=directory,
        check=True,
        env={key: value for key, value in os.environ.items() if key not in ("PWD", "OLDPWD")},
    )
    pid = int(pidfile.read_text())
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


def disk(directory: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / "d", "8M"], check=True)


def has_chroot() -> bool:
    help_ = subprocess.run([qemu_binary(), "-help"], capture_output=True, text=True, check=True)
    return bool(re.search(r"^-chroot", help_.stdout, re.MULTILINE))


def test_a_daemon_with_relative_paths(tmp_path: Path) -> None:
    disk(tmp_path)
    options = ("-name", "placed", "-drive", "file=d,if=virtio", "-qmp", "unix:q,server=on,wait=off")
    with daemon(tmp_path, *options) as pid:
        assert find_vm("placed").pid == pid
        with round_trip("placed", tmp_path) as trip:
            assert trip.record.cwd == str(tmp_path)
            assert trip.record.disks[0].filename == "d"
            assert trip.new.status() == "running"
            assert str(tmp_path / "d") in str(trip.new.describe().disks[0].images)


@pytest.mark.parametrize("as_nobody", [False, True])
def test_a_chrooted_vm_is_found_by_name(tmp_path: Path, as_nobody: bool) -> None:
    disk(tmp_path)
    (tmp_path / "jail").mkdir()
    jail = f"{tmp_path}/jail"
    options = ["-name", "jailed", "-drive", "file=d,if=virtio", "-qmp", "unix:q,server=on,wait=off"]
    if has_chroot():
        options += ["-chroot", jail, *(["-runas", "nobody"] if as_nobody else [])]
    else:
        options += ["-run-with", f"chroot={jail}" + ",user=nobody" * as_nobody]
    with daemon(tmp_path, *options) as pid:
        with connect("jailed") as machine:
            assert machine.pid == pid
            assert machine.describe().cwd == str(tmp_path)
            notes = take_machine(machine, tmp_path / "y.still").notes
            assert all("without disks" in note for note in notes)
        if not as_nobody:  # who may not read this test's directory
            # Its root is another one, so its paths may mean other files than they do here.
            with round_trip("jailed", tmp_path, trust=True) as trip:
                assert trip.new.status() == "running"
                assert Path(f"/proc/{trip.vm.pid}/root").readlink() == Path("/")


def test_options_in_a_file(tmp_path: Path) -> None:
    text = '[name]\n guest = "cfg"\n[device "x"]\n driver = "qemu-xhci"\n# words\n[chardev "c"]\n'
    text += ' backend = "socket"\n path = "q"\n server = "on"\n wait = "off"\n'
    text += '[mon "m"]\n mode = "control"\n chardev = "c"\n[machine]\n type = "q35"\n'
    (tmp_path / "c.cfg").write_text(text)
    more = ("-device", "VGA,id=v", "-set", "device.v.vgamem_mb=32")
    with daemon(tmp_path, "-readconfig", "c.cfg", *more):
        (tmp_path / "q").stat()
        with round_trip("cfg", tmp_path) as trip:
            assert trip.record.config_files[0].text == text
            line = trip.record.command_line
            assert "qemu-xhci,id=x" in line
            assert "VGA,id=v,vgamem_mb=32" in line
            assert not {"-readconfig", "-set"} & set(line)
            assert trip.new.status() == "running"


def test_a_file_of_options_that_is_gone_is_noted(tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text('[device "x"]\n driver = "qemu-xhci"\n')
    with BareVm("-nodefaults", "-m", "64", "-readconfig", "c.cfg", cwd=tmp_path) as vm:
        (tmp_path / "c.cfg").unlink()
        with connect(vm.qmp) as machine:
            record = machine.describe()
    assert "-readconfig" in record.command_line
    assert "c.cfg cannot be read any more: No such file" in record.differences[0]


def test_the_remedy_for_a_vm_with_a_human_monitor_only(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with BareVm(
        "-m",
        "64",
        "-nodefaults",
        "-monitor",
        f"unix:{path},server=on,wait=off",
        name="hmp",
        qmp=False,
    ):
        wait_listening(path)
        with pytest.raises(MachineError, match="does not speak QMP") as by_address:
            connect(str(path))
        with pytest.raises(UsageError, match="no QMP monitor") as by_name:
            connect("hmp")
        for failure in (by_address.value, by_name.value):
            assert failure.remedy is not None
            migrate = re.search(r"'(migrate .*?>)/PATH/FILE\"'", failure.remedy)
            assert migrate is not None
        human(path, f'{migrate[1]}{tmp_path}/stream"', "cont")
        assert "running" in human(path, "info status")
        tool = re.search(r"'stillframe (import .*)'", by_name.value.remedy or "")
        assert tool is not None
        words = shlex.split(tool[1].replace("/PATH/FILE", f"{tmp_path}/stream"))
        words = [f"{tmp_path}/x.still" if word == "SNAPSHOT" else word for word in words]
        subprocess.run(command(*words), check=True)
        with open_snapshot(tmp_path / "x.still") as snapshot:
            assert snapshot.blocks
