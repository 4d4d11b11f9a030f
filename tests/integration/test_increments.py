"""Increments of running VMs: of any VM by comparison, of a clone by what it wrote, four deep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.consistency import check_pages
from guests.qemu import GuestVm, qemu_binary
from stillframe import api
from stillframe.errors import NotFoundError
from stillframe.image import own_pages
from stillframe.model import PageCounts, RamBlock
from stillframe.qmp.client import QmpClient
from stillframe.restore import start
from stillframe.restore.restored import RestoredVm
from stillframe.snapshot.taken import TakenSnapshot
from stillframe.store import open_file, open_snapshot
from tests.integration.cli.program import run
from tests.support.bare_vm import BareVm
from tests.support.image_vm import ram_differences
from tests.support.newer_qemu import require_newer_qemu
from tests.support.probes import has_multiboot_guest, has_uffd_wp
from tests.support.restoring import SMALL

pytestmark = pytest.mark.qemu

RAM_MIB, MEM_MIB, POPULATE_MIB = 64, 8, 16
NUMA = (
    "-object", "memory-backend-ram,id=low,size=32M",
    "-object", "memory-backend-memfd,id=high,size=32M,share=on",
    "-numa", "node,nodeid=0,cpus=0,memdev=low", "-numa", "node,nodeid=1,memdev=high",
)  # fmt: skip
TIMEOUT_S = 120.0


@pytest.fixture(autouse=True)
def needs(places: Path) -> None:
    has_multiboot_guest().require()
    has_uffd_wp().require()


def _guest(memory: str = "memfd", program: str | None = None) -> GuestVm:
    extra = NUMA if memory == "numa" else ()
    kind = "private" if memory == "numa" else memory
    return GuestVm(
        "multiboot",
        ram_mib=RAM_MIB,
        mem_mib=MEM_MIB,
        populate_mib=POPULATE_MIB,
        memory=kind,  # type: ignore[arg-type]
        binary=program,
        extra=extra,
        name="origin",
    )


@pytest.fixture(scope="module")
def source() -> Iterator[GuestVm]:
    has_multiboot_guest().require()
    with _guest().start() as vm:
        yield vm


@pytest.fixture(scope="module")
def base(source: GuestVm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.still"
    _take(source.qmp_path, file)
    return file


@pytest.fixture
def clones(base: Path) -> list[RestoredVm]:
    """Two that run, and whose image is complete."""
    return api.fork(base, 2, trust=True, wait=True)


def _take(qmp: Path | str, file: Path, **options: object) -> TakenSnapshot:
    return api.take(str(qmp), file, **options).wait(TIMEOUT_S)  # type: ignore[arg-type]


def _pause(qmp: Path | str) -> None:
    with QmpClient.connect(str(qmp)) as client:
        client.execute("stop")


def _ram(file: Path) -> dict[tuple[str, int], bytes | None]:
    """All of a snapshot's RAM."""
    with open_snapshot(file) as snapshot:
        return {
            (block.idstr, page): content if content and any(content) else None
            for block in snapshot.blocks
            for page, content in snapshot.iter_pages(block.idstr)
        }


def _assert_one_instant(file: Path) -> None:
    """The guest's own pages are those of one instant, and the file is sound."""
    with open_snapshot(file) as snapshot:
        report = check_pages(
            content
            for block in snapshot.blocks
            for _, content in snapshot.iter_pages(block.idstr)
            if content is not None
        )
        assert report.consistent, str(report)
        snapshot.verify()


def _counts(taken: TakenSnapshot) -> PageCounts:
    counts = taken.statistics.pages
    assert counts.total == counts.zero + counts.data + counts.unchanged
    return counts


def _own_pages_in(file: Path) -> int:
    """What an increment's file itself holds."""
    with open_file(file) as one:
        return sum(sum(one.index.page_counts(n)) for n in range(len(one.index.blocks)))


@pytest.mark.parametrize("mode", ["background", "stop"])
def test_an_increment_of_any_vm_has_what_changed(
    source: GuestVm, base: Path, tmp_path: Path, mode: str
) -> None:
    source.wait_tick()
    file = tmp_path / "next.still"
    counts = _counts(_take(source.qmp_path, file, parent=base, mode=mode))
    assert counts.unchanged > 2 * (counts.data + counts.zero) > 0
    assert _own_pages_in(file) == counts.data + counts.zero
    _assert_one_instant(file)
    assert source.is_progressing()


def test_it_is_what_a_whole_snapshot_of_the_same_instant_is(
    source: GuestVm, base: Path, tmp_path: Path
) -> None:
    first, second, whole = (tmp_path / f"{name}.still" for name in ("1", "2", "whole"))
    _take(source.qmp_path, first, parent=base)
    source.wait_tick()
    _pause(source.qmp_path)
    try:
        _take(source.qmp_path, second, parent=first)
        _take(source.qmp_path, whole)
    finally:
        with QmpClient.connect(str(source.qmp_path)) as client:
            client.execute("cont")
    assert _ram(second) == _ram(whole)
    with open_snapshot(second) as chain, open_snapshot(whole) as alone:
        assert [file.id for file in chain.files[1:]] == [_id(first), _id(base)]
        sizes = [section.idstr for section in chain.skeleton().devices]
        assert sizes == [section.idstr for section in alone.skeleton().devices]


def _id(file: Path) -> str:
    with open_file(file) as one:
        return one.id


def test_a_snapshot_of_another_vm_as_parent_costs_space_but_is_right(
    source: GuestVm, tmp_path: Path
) -> None:
    other, file, whole = (tmp_path / f"{name}.still" for name in ("other", "x", "whole"))
    with BareVm("-S", *SMALL) as another:
        _take(another.qmp, other)
    _pause(source.qmp_path)
    try:
        _take(source.qmp_path, file, parent=other)
        _take(source.qmp_path, whole)
    finally:
        with QmpClient.connect(str(source.qmp_path)) as client:
            client.execute("cont")
    assert _ram(file) == _ram(whole)
    _assert_one_instant(file)


def test_of_a_clone_only_what_it_wrote_is_read(
    clones: list[RestoredVm], base: Path, tmp_path: Path
) -> None:
    vm = clones[0]
    running = tmp_path / "running.still"
    counts = _counts(_take(vm.qmp_address, running, parent=base))
    with open_snapshot(base) as snapshot:
        small = sum(
            block.used_length_bytes // 4096
            for block in snapshot.blocks
            if block.used_length_bytes < 4 << 20
        )
    # The blocks that are not on the image are compared; of the others nothing else is read.
    assert counts.unchanged > counts.total / 2
    assert counts.data + counts.zero < counts.total / 3 + small
    _assert_one_instant(running)
    _pause(vm.qmp_address)
    paused, whole = tmp_path / "paused.still", tmp_path / "whole.still"
    _take(vm.qmp_address, paused, parent=base)
    _take(vm.qmp_address, whole)
    assert _ram(paused) == _ram(whole)
    assert ram_differences(vm.pid, Path(vm.qmp_address), paused) == []


def test_a_page_that_is_missing_among_the_changed_ones_would_be_seen(
    clones: list[RestoredVm], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail."""
    real = own_pages.private_pages

    def without_some(pid: int, block: RamBlock) -> list[tuple[int, int]]:
        return real(pid, block)[::2]

    _pause(clones[0].qmp_address)
    monkeypatch.setattr(own_pages, "private_pages", without_some)
    file = tmp_path / "wrong.still"
    _take(clones[0].qmp_address, file, parent=base)
    assert ram_differences(clones[0].pid, Path(clones[0].qmp_address), file) != []


def test_no_write_is_lost_while_the_clone_writes(
    clones: list[RestoredVm], base: Path, tmp_path: Path
) -> None:
    """The set is read while the guest writes; each chain shows one instant, and
    once paused all that was ever written."""
    vm = clones[1]
    for number in range(6):
        file = tmp_path / f"{number}.still"
        _take(vm.qmp_address, file, parent=base)
        _assert_one_instant(file)
    _pause(vm.qmp_address)
    last = tmp_path / "last.still"
    _take(vm.qmp_address, last, parent=tmp_path / "5.still")  # by comparison
    assert ram_differences(vm.pid, Path(vm.qmp_address), last) == []


def test_a_clones_other_parents_are_compared(
    clones: list[RestoredVm], base: Path, source: GuestVm, tmp_path: Path
) -> None:
    """What a clone wrote since its image says nothing of another parent."""
    other, file = tmp_path / "other.still", tmp_path / "x.still"
    _take(source.qmp_path, other, parent=base)
    _pause(clones[0].qmp_address)
    _take(clones[0].qmp_address, file, parent=other)
    assert ram_differences(clones[0].pid, Path(clones[0].qmp_address), file) == []


@pytest.mark.parametrize(
    ("which", "memory", "increments"),
    [
        ("stock", "memfd", True),
        ("stock", "private", False),
        ("stock", "numa", True),
        ("newer", "private", True),
    ],
)
def test_four_deep_each_taken_while_its_image_is_being_filled(
    which: str,
    memory: str,
    increments: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = qemu_binary() if which == "stock" else str(require_newer_qemu())
    files = [tmp_path / "0.still"]
    with _guest(memory, program).start() as vm:
        _take(vm.qmp_path, files[0])
    # Nobody fills on until the take sees to it: so it begins before the image is complete.
    monkeypatch.setattr(start, "hand_over", lambda filling, path: filling.close())
    for depth in range(1, 5):
        clone = api.restore(files[-1], trust=True, program=program)
        assert clone.image_path is not None, clone.notes
        assert Path(clone.image_path).exists()
        seen: set[str] = set()
        file = tmp_path / f"{depth}.still"
        job = api.take(
            clone.qmp_address,
            file,
            parent=files[-1] if increments else None,
            on_progress=lambda numbers, seen=seen: seen.add(numbers.phase.partition(",")[0]),
        )
        job.wait(TIMEOUT_S)
        assert "waiting for the image" in seen
        _assert_one_instant(file)
        _pause(clone.qmp_address)
        paused = tmp_path / f"{depth}-paused.still"
        _take(clone.qmp_address, paused, parent=file)
        assert ram_differences(clone.pid, Path(clone.qmp_address), paused) == []
        clone.kill()
        files.append(file)
        again = api.restore(file, trust=True, program=program, paused=True, wait=True)
        assert ram_differences(again.pid, Path(again.qmp_address), file) == []
        again.kill()
    with open_snapshot(files[-1]) as snapshot:
        assert len(snapshot.files) == (5 if increments else 1)


def test_the_image_of_an_increment_is_filled_by_an_heir_that_finds_the_parents(
    source: GuestVm, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    file = tmp_path / "x.still"
    _take(source.qmp_path, file, parent=base)
    parent = base.rename(moved / "renamed.still")
    try:
        with pytest.raises(NotFoundError, match=_id(parent)):
            api.restore(file, trust=True)
        monkeypatch.setenv("STILLFRAME_PARENTS", str(moved))
        vm = api.restore(file, trust=True, paused=True)
        with monkeypatch.context() as without:
            without.delenv("STILLFRAME_PARENTS")
            assert vm.wait_resident(TIMEOUT_S)
        assert ram_differences(vm.pid, Path(vm.qmp_address), file) == []
    finally:
        parent.rename(base)


def test_by_the_command_line(source: GuestVm, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.still"
    taken = run("take", str(source.qmp_path), "-o", str(file), "--parent", str(base))
    assert taken.returncode == 0, taken.stderr
    assert b"as in the parent" in taken.stdout
    shown = run("show", str(file))
    assert f"{_id(base)} ({base})".encode() in shown.stdout
    chain = json.loads(run("show", str(file), "--json").stdout)["chain"]
    assert chain == [{"id": _id(base), "file": str(base)}]
    assert run("verify", str(file)).returncode == 0
    moved = base.rename(tmp_path / "moved.bin")
    try:
        missing = run("verify", str(file))
        assert (missing.returncode, missing.stdout) == (9, b"")
        assert _id(moved).encode() in missing.stderr
        assert missing.stderr.count(b"\n") == 1
        assert run("verify", str(file), "--parent-dir", str(moved)).returncode == 0
    finally:
        moved.rename(base)


def test_no_parent_no_take(source: GuestVm, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        _take(source.qmp_path, tmp_path / "x.still", parent=tmp_path / "none.still")
    assert source.is_progressing()
