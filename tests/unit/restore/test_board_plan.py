"""Plans for snapshots of boards: what is kept, what becomes private, and which program runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stillframe.board.board_command import BoardCommand, parse_options
from stillframe.errors import DataError, HostError, NotFoundError, TrustError, UsageError
from stillframe.restore.disk_copies import copy_disk
from stillframe.restore.plan import check_plan
from stillframe.restore.records import RestorePlan
from stillframe.restore.show import plan_lines
from tests.unit.restore.recorded import Planner, machine


def plan(
    planner: Planner,
    command: BoardCommand | None = None,
    *,
    argv: tuple[str, ...] | None = None,
    extra: tuple[str, ...] = (),
    **options: Any,
) -> RestorePlan:
    words = (command or BoardCommand(guest="ledger", name="demo")).words()
    record = msgspec.structs.replace(
        machine(()),
        vmm="board",
        machine_type="stillframe-board-1",
        executable="/tmp/evil/python",
        argv=words if argv is None else argv,
        cwd="/tmp/evil",
    )
    return planner.plan_record(record, extra=extra, **({"program": None} | options))


def started(plan: RestorePlan) -> BoardCommand:
    """The board that the plan's command line would start."""
    own = ["-P", "-m", "stillframe", "board", "run"]
    assert list(plan.argv[: len(own) + 1]) == [sys.executable, *own]
    parsed = parse_options(plan.argv[len(own) + 1 :])
    assert parsed.qmp == plan.qmp_address
    return parsed.board


def test_the_program_is_this_stillframe_and_never_the_files_word(planner: Planner) -> None:
    made = plan(planner)
    assert (made.program, made.cwd) == (sys.executable, "/")
    assert made.argv_with_stream(7)[-2:] == ["--incoming", "fd:7"]
    assert "evil" not in " ".join(made.argv)
    with pytest.raises(UsageError, match="this very Stillframe"):
        plan(planner, program="/bin/sh")
    for argv in (("sh", "-c", "x"), ("stillframe",), ("stillframe", "board", "build", "x.c")):
        with pytest.raises(DataError, match="no 'stillframe board run'"):
            plan(planner, argv=argv)
    with pytest.raises(DataError, match="no option"):
        plan(planner, argv=("stillframe", "board", "run", "--exec", "/bin/sh"))


def test_what_is_kept(planner: Planner) -> None:
    command = BoardCommand(
        guest="ledger",
        ram_bytes=256 << 20,
        vcpus=4,
        name="demo",
        resolution=(320, 200),
        serial="none",
        append="rate=20 dma=all",
        protection="mprotect",
    )
    made = plan(planner, command)
    assert started(made) == command
    assert made.rewrites == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("stdio", "unix:{run}/serial.sock"),
        ("unix:/tmp/s", "unix:{run}/serial.sock"),
        ("/var/log/serial", "{run}/serial.log"),
        ("none", "none"),
    ],
)
def test_the_serial_line_is_its_own(planner: Planner, before: str, after: str) -> None:
    made = plan(planner, BoardCommand(guest="life", serial=before))
    wanted = after.format(run=planner.run)
    assert started(made).serial == wanted
    targets = {(touch.access, touch.target) for touch in made.touches}
    if "sock" in wanted:
        assert ("listen", wanted.removeprefix("unix:")) in targets
    elif wanted != "none":
        assert ("create", wanted) in targets
    assert "/tmp/s" not in {target for _, target in targets}


def test_the_picture_is_its_own(planner: Planner) -> None:
    made = plan(planner, BoardCommand(guest="life", display="/home/x/life.png"))
    assert started(made).display == f"{planner.run}/display.png"
    made = plan(planner, BoardCommand(guest="life", display="terminal"))
    assert started(made).display is None
    assert [rewrite.after for rewrite in made.rewrites if "terminal" in rewrite.before] == [""]


def test_the_disk_is_a_copy(planner: Planner, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    made = plan(planner, BoardCommand(guest="ledger", disk=str(disk)))
    with pytest.raises(TrustError, match=r"it reads .*disk\.img"):
        check_plan(made, trust=False)
    made = plan(planner, BoardCommand(guest="ledger", disk=str(disk)), here=True)
    with pytest.raises(NotFoundError, match=r"disk\.img"):
        check_plan(made, trust=False)
    disk.write_bytes(b"content")
    check_plan(made, trust=False)
    (overlay,) = made.overlays
    assert (overlay.base, overlay.kind) == (str(disk), "copy")
    assert started(made).disk == overlay.overlay == f"{planner.run}/disk0.raw"
    assert any("as they are now" in note for note in made.notes)


def test_a_guest_whose_file_is_gone(planner: Planner, tmp_path: Path) -> None:
    guest = tmp_path / "own.elf"
    guest.write_bytes(b"\x7fELF")
    made = plan(planner, BoardCommand(guest=str(guest)))
    assert started(made).guest == str(guest)
    assert ("read", str(guest)) in {(touch.access, touch.target) for touch in made.touches}
    guest.unlink()
    made = plan(planner, BoardCommand(guest=str(guest)))
    assert started(made).guest is None
    assert any("reset" in note for note in made.notes)


def test_ones_own_options(planner: Planner, tmp_path: Path) -> None:
    command = BoardCommand(guest="ledger", name="old", serial="stdio", disk="/gone")
    own = ("--name", "new", "--serial", "s.log", "--disk", "own.img", "--display=x.png")
    made = plan(planner, command, extra=own)
    board = started(made)
    cwd = os.getcwd()
    assert (board.name, board.guest) == ("new", "ledger")
    assert board.serial == f"{cwd}/s.log"
    assert board.disk == f"{cwd}/own.img"
    assert board.display == f"{cwd}/x.png"
    assert made.overlays == ()
    assert {rewrite.reason for rewrite in made.rewrites} == {"your own"}
    check_plan(made, trust=False)
    assert started(plan(planner, extra=("life",))).guest == "life"
    assert started(plan(planner, extra=("other",))).guest == f"{cwd}/other"


@pytest.mark.parametrize(
    "own", [["--ram", "64M"], ["--qmp", "q"], ["--incoming", "tcp::1"], ["-m", "1G"], ["a", "b"]]
)
def test_options_that_do_not_go_with_a_restore(planner: Planner, own: list[str]) -> None:
    with pytest.raises(UsageError):
        plan(planner, extra=tuple(own))


def test_paused(planner: Planner) -> None:
    assert "--paused" not in plan(planner).argv
    assert plan(planner, paused=True).argv[-1] == "--paused"
    assert plan(planner, extra=("--paused",)).argv[-1] == "--paused"


def test_a_file_that_others_may_change_needs_trust(planner: Planner) -> None:
    made = msgspec.structs.replace(plan(planner), distrust="users other than you may change it")
    with pytest.raises(TrustError, match="board run"):
        check_plan(made, trust=False)
    check_plan(made, trust=True)


def test_what_people_see(planner: Planner) -> None:
    lines = list(plan_lines(plan(planner, BoardCommand(guest="ledger", name="a\x1b[31m"))))
    text = "\n".join(lines)
    assert "--incoming fd:N" in text
    assert "\x1b" not in text
    assert "stillframe-board-1" in text


def test_a_copy_keeps_content_and_holes(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(1 << 20)
        file.write(b"early")
        file.seek((48 << 20) + 5)
        file.write(os.urandom(300_000))
    copy_disk(str(disk), str(copy))
    assert copy.read_bytes() == disk.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.stat().st_blocks * 512 < 2 << 20
    (tmp_path / "empty").touch()
    copy_disk(str(tmp_path / "empty"), str(tmp_path / "empty.copy"))
    assert (tmp_path / "empty.copy").read_bytes() == b""


def test_disks_that_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        copy_disk(str(tmp_path / "none"), str(tmp_path / "copy"))
    with pytest.raises(HostError, match="not a regular file"):
        copy_disk(str(tmp_path), str(tmp_path / "copy"))
    (tmp_path / "disk").touch()
    (tmp_path / "there").touch()
    with pytest.raises(HostError, match="File exists"):
        copy_disk(str(tmp_path / "disk"), str(tmp_path / "there"))
