"""A VM as users have it: a Debian with systemd, cloud-init and the guest agent on its own disk.

Taken while it writes, restored and forked by the command line; takes some minutes under TCG.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.agent import PORT_NAME, agent_execute
from guests.cloud_image import COUNTER, cloud_image
from guests.qemu import qemu_binary
from guests.serial import SerialConsole
from tests.support.probes import has_uffd_wp
from tests.support.taking import command

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(3600)]

BOOT_S, ANSWER_S = 600.0, 60.0
NAME = "cloud-soak"


class CloudVm:
    """A QEMU as the tutorials of cloud images start it."""

    def __init__(self, directory: Path) -> None:
        self.agent = directory / "qga.sock"
        serial = directory / "serial.sock"
        words = [qemu_binary(), "-name", NAME, "-m", "1024", "-smp", "2", "-display", "none"]
        words += cloud_image().arguments(directory / "disk.qcow2", 8 << 30)
        words += ["-serial", f"unix:{serial},server=on,wait=off"]
        words += ["-nic", "user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:0-:22"]
        words += ["-chardev", f"socket,id=qga0,path={self.agent},server=on,wait=off"]
        port = f"virtserialport,chardev=qga0,name={PORT_NAME}"
        words += ["-device", "virtio-serial", "-device", port, "-device", "virtio-rng-pci"]
        words += ["-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        self.console = SerialConsole(serial, timeout_s=30)

    def stop(self) -> None:
        self.console.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def vm() -> Iterator[CloudVm]:
    has_uffd_wp().require()
    with tempfile.TemporaryDirectory(prefix="sf-cloud-") as directory:
        vm = CloudVm(Path(directory))
        try:
            vm.console.wait_line(r"^tick ", timeout_s=BOOT_S)
            yield vm
        finally:
            vm.stop()


def stillframe(*words: str) -> Any:
    done = subprocess.run(command(*words, "--json"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def next_tick(console: SerialConsole) -> int:
    found = re.search(
        r"\d+", console.wait_line(r"^tick ", timeout_s=ANSWER_S, since=console.mark())
    )
    assert found is not None
    return int(found[0])


def counter(agent: Path) -> int:
    """What the guest has on its disk."""
    words = {"path": "/bin/cat", "arg": [COUNTER], "capture-output": True}
    pid = agent_execute(agent, "guest-exec", words)["pid"]
    deadline_s = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline_s:
        status = agent_execute(agent, "guest-exec-status", {"pid": pid})
        if status["exited"]:
            return int(base64.b64decode(status["out-data"]))
        time.sleep(0.2)
    raise AssertionError("cat does not end")


def assert_goes_on(started: dict[str, Any], after: int) -> None:
    """It counts on from the instant, on its serial line and on its disk."""
    sockets = {Path(path).name: Path(path) for path in started["sockets"]}
    console = SerialConsole(next(path for name, path in sockets.items() if "serial" in name))
    try:
        tick = next_tick(console)
        assert after <= tick <= next_tick(console)
        assert counter(sockets["qga0.sock"]) >= tick
    finally:
        console.close()
        subprocess.run(command("kill", started["name"]), check=True, capture_output=True)


@pytest.mark.parametrize("freezes", [True, False])
def test_it_is_taken_and_restored(vm: CloudVm, tmp_path: Path, freezes: bool) -> None:
    before = next_tick(vm.console)
    taken = stillframe(
        "take", NAME, "-o", str(tmp_path / "x.still"), *(["--quiesce"] if freezes else [])
    )
    assert taken["downtime_ms"] > 0
    after = next_tick(vm.console)
    assert counter(vm.agent) >= after
    restored = stillframe("restore", str(tmp_path / "x.still"), "--name", "back", "--wait")
    assert not any("frozen" in note for note in restored["notes"])
    assert_goes_on(restored, before)


def test_it_is_forked(vm: CloudVm) -> None:
    before = next_tick(vm.console)
    clones = stillframe("fork", NAME, "-n", "2", "--wait")
    assert len(clones) == 2
    next_tick(vm.console)
    for clone in clones:
        assert any("it set the clock" in note for note in clone["notes"])
        assert_goes_on(clone, before)
