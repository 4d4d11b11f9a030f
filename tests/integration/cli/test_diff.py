"""``stillframe diff`` and ``show --map`` of a real guest's snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from stillframe.still.page_classes import ZERO, page_classes
from stillframe.still.page_origins import FAULT, NEVER, decode_origins
from stillframe.store import open_snapshot
from tests.integration.cli.program import run

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def later(guest: GuestVm, snapshot: Path) -> Path:
    """An increment on the snapshot, of the same guest later."""
    path = snapshot.with_name("later.still")
    assert guest.is_progressing()
    done = run("take", guest.name, "-o", path, "--parent", snapshot, "-q")
    assert done.returncode == 0, done.stderr
    return path


def test_every_page_that_differs_is_told(snapshot: Path, later: Path) -> None:
    done = run("diff", snapshot, later, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_descendant"]
    with open_snapshot(snapshot) as a, open_snapshot(later) as b:
        assert found["b"]["id"] == b.id
        total = 0
        for block in found["blocks"]:
            before, after = dict(a.iter_pages(block["idstr"])), dict(b.iter_pages(block["idstr"]))
            differ = [page for page in sorted(after) if before[page] != after[page]]
            told = [p for first, pages in block["ranges"] for p in range(first, first + pages)]
            assert told == differ
            counts = block["pages"]
            assert counts["zeroed"] == sum(after[page] is None for page in differ)
            assert counts["new"] == sum(before[page] is None for page in differ)
            assert counts["same"] == len(after) - len(differ)
            total += len(differ)
    assert 0 < total < 20000
    assert any(part["pages"]["changed"] for part in found["regions"])
    cpu = next(device for device in found["devices"] if device["idstr"] == "cpu")
    # Whichever registers the guest has used since; its time stamps go on in any case.
    assert {"eip", "regs", "tsc"} & {field["path"].split("[")[0] for field in cpu["fields"]}
    text = run("diff", snapshot, later).stdout.decode()
    assert f"{total} pages differ" in text
    assert "an increment on A" in text
    assert "cpu, instance 0" in text


def test_its_picture(snapshot: Path, later: Path, tmp_path: Path) -> None:
    done = run("show", later, "--map", tmp_path / "ram.png", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)["map"]
    assert (tmp_path / "ram.png").read_bytes().startswith(b"\x89PNG")
    assert shown["pages"]["unchanged"] > 12000  # what the guest was filled with
    assert 0 < shown["pages"]["data"] < 20000
    assert shown["pages"]["missing"] == 0
    assert shown["parts"][0]["gpa"] == 0
    again = run("show", snapshot, "--map", tmp_path / "ram.png")
    assert again.returncode == 2
    assert b"ram.png" in again.stderr
    text = run("show", snapshot, "--map", tmp_path / "ram.png", "-f").stdout.decode()
    assert "amber data" in text


def test_pages_that_were_never_there_and_those_that_a_fault_saved(
    guest: GuestVm, snapshot: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.still"
    # So slow that the guest writes to something meanwhile, however busy the host is.
    done = run("take", guest.name, "-o", taken, "--json", "--max-bandwidth", "8M")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    done = run("show", taken, "--map", tmp_path / "ram.png", "--json")
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout)["map"]["pages"]
    assert 1000 < pages["never_populated"] <= said["pages"]["never_populated"]
    with open_snapshot(taken) as opened:
        text, page_bytes = opened.manifest.page_origins, opened.index.target_page_bytes
        origins = b"".join(decode_origins(text, opened.blocks, page_bytes))
        for number, of_block in enumerate(decode_origins(text, opened.blocks, page_bytes)):
            content = page_classes(opened, number)
            assert all(content[page] == ZERO for page, bits in enumerate(of_block) if bits & NEVER)
    assert sum(bool(bits & NEVER) for bits in origins) == said["pages"]["never_populated"]
    assert sum(bool(bits & FAULT) for bits in origins) == said["pages"]["faulted"] > 0
