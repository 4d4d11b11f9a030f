"""What tells clones apart: ports, vmgenid, and what the guest's agent renews."""

from __future__ import annotations

import base64
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm
from stillframe import api
from stillframe.disks.agent_channel import AgentPlace
from stillframe.qmp.client import QmpClient
from stillframe.restore import agents, identity, restored
from stillframe.restore.restored import list_restored
from tests.integration.cli.program import run
from tests.support.image_vm import PAGE, read_ram
from tests.support.probes import has_linux_guest, has_uffd_wp

pytestmark = pytest.mark.qemu

GUID = uuid.UUID("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87")
DEVICES = (
    "-device", f"vmgenid,guid={GUID}",
    "-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53",
    "-device", "virtio-net-pci,netdev=net0",
)  # fmt: skip


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    has_linux_guest().require()
    has_uffd_wp().require()
    with GuestVm("linux", ram_mib=128, mem_mib=8, name="origin", extra=DEVICES).start() as vm:
        yield vm


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(restored, "ROOTS_RUN", tmp_path / "stillframe")  # not others' VMs
    tmp_path.chmod(0o700)
    yield
    for vm in list_restored():
        vm.kill()


def guids(ram: dict[str, memoryview]) -> dict[tuple[str, int], bytes]:
    """What lies where the firmware has put a vmgenid, by block and page (QEMU
    ``docs/specs/vmgenid.rst``: at offset 40 of a page whose rest is empty)."""
    return {
        (name, at // PAGE): bytes(block[at + 40 : at + 56])
        for name, block in ram.items()
        if len(block) > (64 << 20)
        for at in range(0, len(block), PAGE)
        if any(block[at + 40 : at + 56])
        and not any(block[at : at + 40])
        and not any(block[at + 56 : at + PAGE])
    }


def test_each_has_a_vmgenid_and_ports_of_its_own(source: GuestVm, tmp_path: Path) -> None:
    file = tmp_path / "kept.still"
    live = api.fork(source.pid, 2, paused=True, keep=file)
    clones = [*live, *api.fork(file, 1, name="of-a-file", paused=True)]
    for clone in clones:
        assert clone.wait_resident(60)
    (place,) = (
        where
        for where, guid in guids(read_ram(source.pid, str(source.qmp_path))).items()
        if guid == GUID.bytes_le
    )
    seen = {GUID.bytes_le}
    for clone in clones:
        with QmpClient.connect(clone.qmp_address) as qmp:
            told = qmp.execute("query-vm-generation-id")
        guid = guids(read_ram(clone.pid, clone.qmp_address))[place]
        assert isinstance(told, dict)
        assert uuid.UUID(told["guid"]).bytes_le == guid
        seen.add(guid)
    assert len(seen) == 4
    ports = [(one.protocol, one.port) for clone in clones for one in clone.forwards]
    assert len(set(ports)) == 6
    for clone in clones:
        tcp, udp = clone.forwards
        assert (tcp.network, tcp.protocol, tcp.guest_port) == ("net0", "tcp", 22)
        assert (udp.protocol, udp.guest_port) == ("udp", 53)
        socket.create_connection(("127.0.0.1", tcp.port), 60).close()
        assert any("each has a new one" in note for note in clone.notes)
        assert any("host name, machine id" in note for note in clone.notes)
    shown = json.loads(run("ps", "--json").stdout)
    assert {(f["protocol"], f["port"]) for vm in shown for f in vm["forwards"]} == set(ports)


class Agent(threading.Thread):
    """Stands for the guest agent of a guest: answers all, and remembers."""

    def __init__(self, path: Path, refuses: str = "") -> None:
        super().__init__(daemon=True)
        self.asked: list[dict[str, Any]] = []
        self._refuses = refuses
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(1)
        self.start()

    def run(self) -> None:
        link, _ = self._socket.accept()
        with link, link.makefile("rwb") as stream:
            for line in stream:
                request = json.loads(line.lstrip(b"\xff"))
                self.asked.append(request)
                name = request["execute"]
                arguments = request.get("arguments", {})
                answer: dict[str, Any] = {"return": arguments.get("id", 7)}
                if name == "guest-file-write":
                    count = len(base64.b64decode(arguments["buf-b64"]))
                    answer = {"return": {"count": count, "eof": False}}
                if name == self._refuses:
                    answer = {"error": {"class": "CommandNotFound", "desc": f"{name} is disabled"}}
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()


@pytest.mark.parametrize("refuses", ["", "guest-file-open", "guest-set-time"])
def test_the_agent_sets_the_clock_and_stirs_random_numbers(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    place = AgentPlace(str(tmp_path / "agent.sock"))
    agent = Agent(Path(place.path), refuses)
    monkeypatch.setattr(agents, "find_agent", lambda *_: place)
    (clone,) = api.fork(source.pid)
    (note,) = (note for note in clone.notes if note.startswith("guest agent: "))
    names = [request["execute"] for request in agent.asked]
    assert names[:2] == ["guest-sync-delimited", "guest-set-time"]
    if refuses:
        assert f"{refuses} is disabled" in note
    else:
        assert note == "guest agent: it set the clock, it stirred the random numbers"
        assert agent.asked[2]["arguments"] == {"path": "/dev/urandom", "mode": "w"}
        assert names[3:] == ["guest-file-write", "guest-file-close"]
    assert note in next(vm for vm in list_restored() if vm.pid == clone.pid).notes


def test_a_silent_agent_is_not_waited_for_long(
    source: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = AgentPlace(str(tmp_path / "agent.sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(place.path)
        silent.listen(1)
        monkeypatch.setattr(
            agents, "find_agent", lambda *_: AgentPlace(str(tmp_path / "agent.sock"))
        )
        monkeypatch.setattr(identity, "_ANSWER_S", 0.2)
        (clone,) = api.fork(source.pid)
    assert any("does not answer within 0.2 s" in note for note in clone.notes)
