"""Guests of the board as files: how they are found, built and laid out. None is run."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import stillframe
import stillframe.board.guests as board_guests
from stillframe.board.guests import GUEST_NAMES, build_guest, build_own_guest, guest_path
from stillframe.errors import HostError, NotFoundError, UsageError

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(board_guests.__file__).parent
MINIMAL = '#include "board.h"\nvoid board_main(unsigned cpu) { print("%u\\n", cpu); }\n'
ET_EXEC, PT_LOAD = 2, 1

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="missing compiler: no cc"
)


def test_a_guest_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match=r"no guest legder; choose one of ledger, life, writer"):
        guest_path("legder")


def test_an_installation_without_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_guests, "_DIRECTORY", tmp_path)
    with pytest.raises(HostError, match="the guest ledger is not installed"):
        guest_path("ledger")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ledger.elf").touch()
    assert guest_path("ledger") == tmp_path / "bin" / "ledger.elf"


@needs_compiler
@pytest.mark.parametrize("name", GUEST_NAMES)
def test_layout_of_the_elf_file(tmp_path: Path, name: str) -> None:
    content = build_own_guest(name, tmp_path).read_bytes()
    assert content[:6] == b"\x7fELF\x02\x01"
    kind, machine = struct.unpack_from("<HH", content, 16)
    entry, headers = struct.unpack_from("<QQ", content, 24)
    assert (kind, machine) == (ET_EXEC, 62)
    size, count = struct.unpack_from("<HH", content, 54)
    assert count == 2
    for at in range(headers, headers + size * count, size):
        segment, _flags, _offset, address, _physical, _file, length = struct.unpack_from(
            "<IIQQQQQ", content, at
        )
        assert segment == PT_LOAD
        # the ledger's pages begin at 2 MiB
        assert 1 << 20 <= address <= address + length <= (2 if name == "ledger" else 4) << 20
    assert entry == 1 << 20
    assert b"GNU" not in content, "a note with a build id: builds would differ"


@needs_compiler
def test_building_twice_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = (
        build_own_guest("ledger", tmp_path),
        build_own_guest("ledger", tmp_path / "other"),
    )
    assert first.read_bytes() == second.read_bytes()


@needs_compiler
def test_a_guest_of_ones_own(tmp_path: Path) -> None:
    source, output = tmp_path / "a b.c", tmp_path / "out put.elf"
    source.write_text(MINIMAL)
    assert build_guest(source, output) == ""
    assert output.read_bytes()[:4] == b"\x7fELF"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.c", "out put.elf"]


@needs_compiler
def test_several_files(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "one.c").write_text(
        '#include "board.h"\nu64 two(void);\nvoid board_main(unsigned cpu) { put_number(two()); }\n'
    )
    (parts / "two.c").write_text('#include "board.h"\nu64 two(void) { return 2; }\n')
    build_guest(parts, tmp_path / "parts.elf")
    assert (tmp_path / "parts.elf").stat().st_mode & 0o100


@needs_compiler
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int x = ;\n", r"wrong\.c:1:9: error:"),
        ("int x;\n", r"undefined reference to .board_main"),
    ],
)
def test_the_compiler_complains(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "wrong.c").write_text(source)
    output = tmp_path / "wrong.elf"
    output.write_text("the old one")
    with pytest.raises(UsageError, match=message):
        build_guest(tmp_path / "wrong.c", output)
    assert output.read_text() == "the old one"
    assert len(list(tmp_path.iterdir())) == 2


@needs_compiler
def test_warnings_are_returned(tmp_path: Path) -> None:
    (tmp_path / "odd.c").write_text(MINIMAL.replace("%u", "%s"))
    assert "warning" in build_guest(tmp_path / "odd.c", tmp_path / "odd.elf")


def test_no_source(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.c", tmp_path):
        with pytest.raises(NotFoundError, match="there is no C source"):
            build_guest(missing, tmp_path / "none.elf")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.c").write_text(MINIMAL)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"there is no C compiler; install one .*gcc"):
        build_guest(tmp_path / "a.c", tmp_path / "a.elf")


def run_command(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    found = str(Path(stillframe.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_compiler
def test_the_guide(tmp_path: Path) -> None:
    """The guest in the guide compiles as it stands there, by the command that stands there."""
    guide = (ROOT / "docs" / "guides" / "board-guest.md").read_text()
    match = re.search(r"```c\n(.*?)```", guide, re.DOTALL)
    assert match
    (tmp_path / "visitors.c").write_text(match.group(1))
    assert len(match.group(1).splitlines()) <= 12
    command = re.search(r"^stillframe (board build .*)$", guide, re.MULTILINE)
    assert command
    words = ["-m", "stillframe.cli.main", *command.group(1).split()]
    done = run_command(words, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "visitors.elf").exists()


def test_what_a_user_needs_is_in_the_package() -> None:
    for name in ("include/board.h", "board.ld", "board.flags", "lib/start.S", "lib/console.c"):
        assert (PACKAGE / name).is_file(), name
