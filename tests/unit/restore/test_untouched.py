"""The stream without the zero pages that a new VM has anyway, and the look at free memory."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from stillframe.errors import HostError
from stillframe.kernel import memory_cgroups as kernel_cgroups
from stillframe.restore import available
from stillframe.restore.untouched import Touched, memory_needed_bytes, stream_to
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Pages, ZeroRun
from tests.support_store.memory import MemorySink
from tests.support_store.small import BLOCKS, PAGE, open_bytes, write_small

BEYOND = 1 << 64


def pages_of(stream: bytes) -> dict[tuple[int, int], bytes | None]:
    found: dict[tuple[int, int], bytes | None] = {}
    for event in StreamReader(io.BytesIO(stream)).events():
        if isinstance(event, Pages):
            for at in range(0, len(event.data), PAGE):
                page = (event.offset_bytes + at) // PAGE
                found[event.block_index, page] = event.data[at : at + PAGE]
        elif isinstance(event, ZeroRun):
            for n in range(event.pages):
                found[event.block_index, event.offset_bytes // PAGE + n] = None
    return found


@pytest.mark.parametrize("seed", range(30))
def test_it_holds_all_data_and_the_zeroes_of_what_was_touched(seed: int) -> None:
    dice = random.Random(seed)
    sink = MemorySink()
    _, whole, ram = write_small(sink, seed=seed, shuffled=bool(seed % 2))
    touched: Touched = {}
    for name, _ in dice.sample(BLOCKS, dice.randrange(len(BLOCKS) + 1)):
        bounds = sorted(dice.sample(range(64), 2 * dice.randrange(4)))
        touched[name] = [*zip(bounds[::2], bounds[1::2], strict=True), (64, BEYOND)]
    with open_bytes(sink.content) as snapshot:
        pieces = list(stream_to(snapshot, touched))
    assert sum(stands_for for _, stands_for in pieces) == len(whole)
    stream = b"".join(piece for piece, _ in pieces)
    expected = {
        (block, page): content
        for (block, page), content in ram.items()
        if content is not None
        or BLOCKS[block][0] not in touched
        or any(first <= page < past for first, past in touched[BLOCKS[block][0]])
    }
    assert pages_of(stream) == expected
    if not touched:
        assert stream == whole


def test_what_a_vm_takes_is_its_data() -> None:
    sink = MemorySink()
    _, _, ram = write_small(sink)
    with open_bytes(sink.content) as snapshot:
        data = sum(content is not None for content in ram.values())
        assert memory_needed_bytes(snapshot) == data * PAGE


@pytest.fixture(params=["cgroup", "cgroup2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    """A host of either version of cgroups, with us in ``one`` of the directory that is given."""
    (tmp_path / "meminfo").write_text("MemAvailable: 2048 kB\nSwapFree: 1024 kB\n")
    (tmp_path / "self").mkdir()
    mounted = f"9 1 0:1 / {tmp_path}/root rw - {kind} none rw,memory\n"
    (tmp_path / "self/mountinfo").write_text(mounted)
    (tmp_path / "self/cgroup").write_text("4:memory:/vms/one\n0::/vms/one\n")
    (tmp_path / "root/vms/one").mkdir(parents=True)
    monkeypatch.setattr(available, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(kernel_cgroups, "_PROC", tmp_path)
    return tmp_path / "root/vms"


def test_memory_and_swap_of_the_host(host: Path) -> None:
    available.check_memory(3 << 20)
    with pytest.raises(HostError, match="too little memory") as caught:
        available.check_memory((3 << 20) + 1)
    assert "the host has 3 MiB free" in (caught.value.why or "")


@pytest.mark.parametrize("limited", ["one", "."])
def test_the_least_of_the_cgroups(host: Path, kind: str, limited: str) -> None:
    limit, usage, prefix = kernel_cgroups.NAMES[kind]
    for directory in (host, host / "one"):
        (directory / limit).write_text("max\n" if kind == "cgroup2" else f"{2**63 - 4096}\n")
        (directory / usage).write_text("1000000\n")
    (host / limited / limit).write_text("1500000\n")
    stat = f"anon 7\n{prefix}inactive_file 100000\n{prefix}active_file 5\n"
    (host / limited / "memory.stat").write_text(stat)
    available.check_memory(600_005)
    with pytest.raises(HostError, match="too little memory") as caught:
        available.check_memory(600_006)
    assert "cgroup" in (caught.value.why or "")


def test_a_host_that_tells_nothing(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_MEMINFO", host / "none")
    monkeypatch.setattr(kernel_cgroups, "_PROC", host / "none")
    available.check_memory(1 << 60)
