"""A real guest that gives memory back while its RAM is saved: balloon, free page reporting and
virtio-mem, on small and on huge pages. The snapshot shows the instant, or there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe import api
from stillframe.errors import SnapshotFailed, StillframeError
from stillframe.machine.finding import connect
from stillframe.still.frames import BytesLike
from stillframe.store.backends.local import LocalSink
from tests.support.bare_vm import BareVm
from tests.support.memory_guest import MemoryGuest, filled_pages, huge_pages_mounted
from tests.support.probes import has_huge_pages, has_qemu, has_uffd_wp

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not has_qemu(), reason=f"missing qemu: {has_qemu().reason}"),
]

MIB = 1 << 20
FILLED = 16384
BALLOON = "virtio-balloon-pci,id=balloon0"


@pytest.fixture(autouse=True)
def _needs_uffd() -> None:
    has_uffd_wp().require()


class Gated(LocalSink):
    """A file that takes nothing before the gate is open."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.asked, self.gate = threading.Event(), threading.Event()

    def write(self, data: BytesLike) -> None:
        self.asked.set()
        assert self.gate.wait(300)
        super().write(data)


def taken_while(
    guest: MemoryGuest, file: Path, does: Callable[[], object]
) -> StillframeError | None:
    """Take a snapshot, of which nothing is written before the guest has done something that it
    begins once it runs on; its error."""
    sink = Gated(file)
    job = api.take(str(guest.qmp_path), sink)
    try:
        assert sink.asked.wait(120)
        does()
    finally:
        sink.gate.set()
    try:
        job.wait(120)
    except StillframeError as error:
        return error
    return None


def free_and_inflate(guest: MemoryGuest) -> None:
    guest.tell("free")
    guest.execute("balloon", value=128 * MIB)
    deadline = time.monotonic() + 120
    while guest.execute("query-balloon")["actual"] > 160 * MIB:
        assert time.monotonic() < deadline, "the balloon did not inflate"
        time.sleep(0.1)


def test_a_balloon_that_inflates_mid_take(tmp_path: Path) -> None:
    with MemoryGuest("-m", "256", "-device", BALLOON) as guest:
        guest.tell(f"pop {FILLED}")
        assert taken_while(guest, tmp_path / "a.still", lambda: free_and_inflate(guest)) is None
        assert len(filled_pages(tmp_path / "a.still")) == FILLED


def test_a_balloon_of_shared_memory_that_inflates_mid_take(tmp_path: Path) -> None:
    """QEMU punches the pages out of the file before anybody is told: they were held."""
    memory = ("-object", "memory-backend-memfd,id=m,size=256M", "-machine", "memory-backend=m")
    with MemoryGuest("-m", "256", *memory, "-device", BALLOON) as guest:
        guest.tell(f"pop {FILLED}")
        assert taken_while(guest, tmp_path / "a.still", lambda: free_and_inflate(guest)) is None
        assert len(filled_pages(tmp_path / "a.still")) == FILLED


def test_free_pages_reported_mid_take(tmp_path: Path) -> None:
    with MemoryGuest("-m", "256", "-device", f"{BALLOON},free-page-reporting=on") as guest:
        guest.tell(f"pop {FILLED}")

        def free() -> None:
            before = resident_bytes(guest)
            guest.tell("free")
            deadline = time.monotonic() + 120
            while resident_bytes(guest) > before - 16 * MIB:
                assert time.monotonic() < deadline, "nothing was reported"
                time.sleep(0.1)

        # The guest's kernel waits two seconds before it reports.
        assert taken_while(guest, tmp_path / "a.still", free) is None
        assert len(filled_pages(tmp_path / "a.still")) == FILLED


def resident_bytes(guest: MemoryGuest) -> int:
    return int(Path(f"/proc/{guest.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("share", ["on", "off"])
def test_free_huge_pages_are_punched_out_unseen_so_it_is_refused(
    tmp_path: Path, share: str
) -> None:
    has_huge_pages(40).require()
    memory = f"memory-backend-memfd,id=m,size=64M,share={share},hugetlb=on,hugetlbsize=2M"
    with (
        BareVm(
            "-S", "-m", "64", "-object", memory, "-machine", "memory-backend=m",
            "-device", f"{BALLOON},free-page-reporting=on",
        ) as vm,
        connect(vm.qmp) as machine,
    ):  # fmt: skip
        found = {h.name: h.severity for h in machine.preflight("background")}
        assert found["free-page-reporting"] == "refuse"


def free_and_shrink(guest: MemoryGuest) -> None:
    guest.tell("free")
    guest.execute(
        "qom-set",
        path="/machine/peripheral/vm0", property="requested-size", value=128 * MIB,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while guest.execute("query-memory-devices")[0]["data"]["size"] > 256 * MIB:
        assert time.monotonic() < deadline, "nothing was unplugged"
        time.sleep(0.1)


def test_virtio_mem_of_shared_memory_that_shrinks_mid_take(tmp_path: Path) -> None:
    """In small pages: each was held, and saved before QEMU could go on."""
    with MemoryGuest(
        "-M", "q35", "-m", "192M,slots=2,maxmem=2G",
        "-object", "memory-backend-memfd,id=v,size=512M",
        "-device", "virtio-mem-pci,id=vm0,memdev=v,requested-size=512M",
    ) as guest:  # fmt: skip
        guest.tell(f"pop {FILLED}")
        file = tmp_path / "a.still"
        assert taken_while(guest, file, lambda: free_and_shrink(guest)) is None
        assert len(filled_pages(file)) == FILLED


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_virtio_mem_on_huge_pages_that_shrinks_mid_take(tmp_path: Path, kind: str) -> None:
    """And grows elsewhere, so that the sum of its blocks tells nothing."""
    has_huge_pages(520).require()
    with huge_pages_mounted() as directory:
        backend = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M"
        if kind == "file":
            backend = f"memory-backend-file,mem-path={directory}"
        with MemoryGuest(
            "-M", "q35", "-m", "192M,slots=2,maxmem=2G",
            "-object", f"{backend},share=on,id=v,size=512M",
            "-device", "virtio-mem-pci,id=vm0,memdev=v,requested-size=512M",
        ) as guest:  # fmt: skip
            guest.tell("pop 120000")
            file = tmp_path / "a.still"

            error = taken_while(guest, file, lambda: free_and_shrink(guest))
            assert isinstance(error, SnapshotFailed), len(filled_pages(file))
            assert "punched out" in (error.why or "")
            assert not file.exists()
