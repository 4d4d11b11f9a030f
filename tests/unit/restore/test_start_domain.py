"""A domain that is started from a snapshot, or goes back to it, with a libvirt that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stillframe.errors import HostError, MachineError
from stillframe.machine.libvirt.domain import DomainRef
from stillframe.model import DomainRecord
from stillframe.restore import domain_start, restore_domain
from stillframe.restore.domain_plan import DomainPlan
from stillframe.restore.records import Backend, ImagePlan
from stillframe.restore.restore_domain import RestoredDomain, start_domain
from stillframe.restore.restored import RestoredVm
from stillframe.still.snapshot import Snapshot
from stillframe.store import open_snapshot
from tests.support_store.chains import MadeChain
from tests.support_store.small import random_ram
from tests.support_store.stores import machine

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
XML = f"<domain type='qemu'><name>web</name><uuid>{UUID}</uuid></domain>"

WEB = machine("web", domain=DomainRecord(uri="qemu:///system", uuid=UUID, xml=XML, live_xml=XML))


class Libvirt(SimpleNamespace):
    """One persistent domain; what is in ``failing`` fails. ``running``: of which generation."""

    libvirtError = RuntimeError  # noqa: N815 - libvirt's word
    VIR_DOMAIN_RUNNING = 1

    def __init__(self) -> None:
        super().__init__(failing=set(), running="before", defined=0)

    def open(self, _uri: str) -> Libvirt:
        return self

    def _do(self, what: str) -> None:
        if what in self.failing:
            raise RuntimeError(f"{what} failed")

    def getLibVersion(self) -> int:  # noqa: N802
        return 9_000_000

    def close(self) -> None:
        pass

    def lookupByUUIDString(self, _uuid: str) -> Libvirt:  # noqa: N802
        if self.running == "restored":
            self._do("lookup")
        return self

    def isPersistent(self) -> bool:  # noqa: N802
        return True

    def isActive(self) -> bool:  # noqa: N802
        return self.running != "off"

    def destroy(self) -> None:
        self.running = "off"

    def restoreFlags(self, pipe: str, _xml: None, _flags: int) -> None:  # noqa: N802
        with Path(pipe).open("rb") as stream:
            stream.read(16)
        self._do("restore")
        self.running = "restored"

    def state(self) -> tuple[int]:
        return (self.VIR_DOMAIN_RUNNING,)

    def defineXML(self, _xml: str) -> None:  # noqa: N802
        self._do("define")
        self.defined += 1


@pytest.fixture
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    made = Libvirt()

    def destroyed(_ref: DomainRef) -> None:
        made.running = "off"

    monkeypatch.setattr(domain_start, "libvirt_module", lambda: made)
    monkeypatch.setattr(domain_start, "destroy_domain", destroyed)
    monkeypatch.setattr(restore_domain, "domains_root", lambda: tmp_path / "records")
    monkeypatch.setattr(restore_domain, "sweep_domains", lambda: None)
    return made


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[RestoredVm]:
    """The records."""
    vms: list[RestoredVm] = []
    monkeypatch.setattr(restore_domain, "write_vm", vms.append)
    return vms


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    chain = MadeChain()
    chain.add(random_ram(1), machine=WEB)
    with chain.open() as opened:
        yield opened


def plan(tmp_path: Path, *, revert: bool) -> DomainPlan:
    return DomainPlan(
        snapshot=str(tmp_path / "web.still"),
        name="web",
        uuid=UUID,
        uri="qemu:///system",
        xml=XML,
        streamed_xml=XML,
        image=ImagePlan(streamed="as you asked"),
        directory=str(tmp_path / "web.still.reverted-0a1b2c"),
        touches=(),
        overlays=(),
        distrust=(),
        risks=(),
        taken_here=True,
        notes=(),
        revert=revert,
    )


def started(tmp_path: Path, snapshot: Snapshot, **how: Any) -> RestoredDomain:
    return start_domain(plan(tmp_path, **how), snapshot)


@pytest.mark.parametrize("revert", [True, False])
def test_killing_it_takes_only_disks_that_nobody_else_has(
    tmp_path: Path, libvirt: Libvirt, snapshot: Snapshot, written: list[RestoredVm], revert: bool
) -> None:
    made = started(tmp_path, snapshot, revert=revert)
    assert (libvirt.running, libvirt.defined) == ("restored", int(revert))
    (vm,) = written
    assert vm.disk_directory == (None if revert else made.directory)


@pytest.mark.parametrize("failing", ["lookup", "define"])
def test_it_does_not_run_on_without_its_disks(
    tmp_path: Path, libvirt: Libvirt, snapshot: Snapshot, written: list[RestoredVm], failing: str
) -> None:
    libvirt.failing.add(failing)
    with pytest.raises(MachineError):
        started(tmp_path, snapshot, revert=True)
    assert libvirt.running == "off"
    assert not Path(plan(tmp_path, revert=True).directory).exists()
    assert written == []


@pytest.mark.parametrize("revert", [True, False])
def test_a_domain_that_did_not_start_is_not_ended(
    tmp_path: Path, libvirt: Libvirt, snapshot: Snapshot, revert: bool
) -> None:
    libvirt.failing.add("restore")
    with pytest.raises(MachineError):
        started(tmp_path, snapshot, revert=revert)
    assert libvirt.running == ("off" if revert else "before")
    assert not Path(plan(tmp_path, revert=revert).directory).exists()


@pytest.mark.parametrize("revert", [True, False])
def test_a_record_that_cannot_be_written(
    tmp_path: Path,
    libvirt: Libvirt,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    revert: bool,
) -> None:
    """What went back has its definition on the new disks: those stay, and it runs."""

    def full(_vm: RestoredVm) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(restore_domain, "write_vm", full)
    with pytest.raises(OSError, match="no space"):
        started(tmp_path, snapshot, revert=revert)
    assert libvirt.running == ("restored" if revert else "off")
    assert Path(plan(tmp_path, revert=revert).directory).exists() == revert
    assert list((tmp_path / "records").iterdir()) == []


def test_an_images_filler_is_told_of_an_increments_parents(
    tmp_path: Path,
    libvirt: Libvirt,
    written: list[RestoredVm],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = MadeChain()
    chain.add(random_ram(1), machine=WEB)
    chain.add({(0, 1): None}, machine=WEB)
    elsewhere = tmp_path / "elsewhere" / "base.still"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(chain.contents[0])
    (tmp_path / "web.still").write_bytes(chain.contents[1])
    opened: list[str] = []

    def make(path: str, *_: object, parents: list[str] = [], **_kw: object) -> None:  # noqa: B006
        with open_snapshot(path, parents=parents) as again:
            opened.append(again.id)
        raise HostError("no image here")

    monkeypatch.setattr(
        domain_start, "image_place", lambda *_, **__: nullcontext(SimpleNamespace(make_file=None))
    )
    monkeypatch.setattr(domain_start.Filling, "make", make)
    image = ImagePlan(
        backends=(Backend(block=0, size_bytes=4096, id="ram", canonical=False, option=None),)
    )
    wanted = msgspec.structs.replace(plan(tmp_path, revert=False), image=image)
    monkeypatch.setattr(domain_start.DomainStart, "_qemus_uid", lambda _: 0)
    with open_snapshot(tmp_path / "web.still", parents=[elsewhere]) as snapshot:
        made = start_domain(wanted, snapshot)
        assert opened == [snapshot.id]
    assert made.image_path is None
    assert len(written) == 1
