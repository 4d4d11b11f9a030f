"""``stillframe board run`` and ``board build``: as a process, on pipes and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.board.guests import guest_path
from stillframe.qmp.client import QmpClient
from tests.integration.cli.program import PROGRAM, run
from tests.support.board_process import BoardProcess, end, ledger, transfers
from tests.support.ledger_host import Console
from tests.support.ordinary_user import OrdinaryUser, ordinary_user
from tests.support.tiny_guest import IDLE, PANIC, RESET, write_guest
from tests.support.waiting import wait_until
from tests.unit.restore.recorded import machine, write_snapshot

__all__ = ["ordinary_user"]

TEN_LINES = """
#include "board.h"

void board_main(unsigned cpu)
{
    if (cpu) return;
    print("hello from %llu MiB\\n", board_info()->ram_bytes >> 20);
    power_off(7);
}
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private sockets go."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path / "stillframe"


def start(*words: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, "board", "run", *map(str, words)],
        **({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
           | options),  # type: ignore[call-overload]
    )  # fmt: skip


def test_a_guest_of_ones_own(tmp_path: Path) -> None:
    source = tmp_path / "hello.c"
    source.write_text(TEN_LINES)
    guest = tmp_path / "hello.elf"
    built = run("board", "build", source, "-o", guest, "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout) == {"file": str(guest)}
    done = run("board", "run", guest, "--ram", "32M", "--cpus", "2")
    assert done.stdout == b"hello from 32 MiB\r\n" or done.stdout == b"hello from 32 MiB\n"
    assert done.returncode == 7
    (line,) = done.stderr.decode().splitlines()
    assert re.fullmatch(r"stillframe: board hello \(process \d+\), QMP at /.*/qmp\.sock", line)


def test_what_a_compiler_refuses(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text('#include "board.h"\nvoid board_main(unsigned cpu) { nonsense; }\n')
    done = run("board", "build", source, "-o", tmp_path / "bad.elf")
    assert done.returncode == 2
    assert b"nonsense" in done.stderr
    for output, code in ((tmp_path / "no" / "x", 7), (tmp_path, 2)):
        assert run("board", "build", source, "-o", output).returncode == code
    assert not (tmp_path / "bad.elf").exists()


def test_standard_input_and_output_are_the_serial_line(runtime: Path) -> None:
    words = ("ledger", "--ram", "16M", "--append", "rate=5")
    with start(*words, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"ledger ready")
            process.stdin.write(b"a\nq\n")
            process.stdin.flush()
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"AUDIT ok" in out
    assert b"ledger off" in out
    assert list(runtime.iterdir()) == []


def test_a_guest_that_panics(tmp_path: Path) -> None:
    done = run("board", "run", write_guest(tmp_path / "g.elf", PANIC), "--serial", "none")
    assert done.returncode == 134
    assert b"panicked" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_guest_that_resets_goes_on(tmp_path: Path) -> None:
    guest = write_guest(tmp_path / "g.elf", RESET)
    process = start(guest, "--serial", "none")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)  # it starts again and again
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_is_ended_by_a_signal(number: signal.Signals, runtime: Path, tmp_path: Path) -> None:
    process = start(write_guest(tmp_path / "g.elf", IDLE), "--serial", "none")
    assert process.stderr is not None
    assert b"QMP at" in process.stderr.readline()
    assert len(list(runtime.iterdir())) == 1
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"stillframe: ended by {number.name}\n".encode()
    assert list(runtime.iterdir()) == []


def test_its_monitor(tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    process = start("writer", "--qmp", socket, "--name", "w", "--cpus", 2, "--paused",
                    "--serial", tmp_path / "log")  # fmt: skip
    try:
        assert process.stderr is not None
        assert f"QMP at {socket}".encode() in process.stderr.readline()
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        with QmpClient.connect(str(socket)) as qmp:
            assert qmp.execute("query-status") == {"status": "prelaunch", "running": False}
            assert qmp.execute("query-name") == {"name": "w"}
            qmp.execute("cont")
            wait_until(lambda: b"writer ready" in (tmp_path / "log").read_bytes())
            qmp.execute("quit")
        assert process.wait(60) == 0
        assert not socket.exists()
    finally:
        process.kill()
        process.communicate()


def test_a_socket_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "qmp").touch()
    done = run("board", "run", "writer", "--qmp", tmp_path / "qmp")
    assert done.returncode == 2
    assert b"exists, and is no socket" in done.stderr


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    words = ("writer", "--qmp", tmp_path / "qmp", "--serial", "none", "--paused")
    for _ in range(2):  # the second one finds what the first one left
        process = start(*words)
        try:
            assert process.stderr is not None
            assert f"QMP at {tmp_path}/qmp".encode() in process.stderr.readline()
            other = run("board", "run", *words)
            assert other.returncode == 4
            assert other.stderr.endswith(b"/qmp; choose another path\n"), other.stderr
            assert b"somebody listens on" in other.stderr
        finally:
            process.kill()
            process.communicate()
        assert (tmp_path / "qmp").is_socket()


def test_what_a_killed_board_left_is_swept_away(runtime: Path, tmp_path: Path) -> None:
    guest = write_guest(tmp_path / "g.elf", IDLE)
    (runtime / "restored").mkdir(parents=True)  # of a restored VM: stays
    (runtime / "restored" / "qmp.sock").touch()
    boards = []
    try:
        for _ in range(3):
            boards.append(start(guest, "--serial", "none"))
            assert boards[-1].stderr is not None
            assert b"QMP at" in boards[-1].stderr.readline()
        boards[0].kill()
        boards[0].wait()
        assert len(list(runtime.iterdir())) == 4
        boards.append(start(guest, "--serial", "none"))
        assert boards[-1].stderr is not None
        assert b"QMP at" in boards[-1].stderr.readline()
        assert len(list(runtime.iterdir())) == 4  # the first one's went
        for board in boards[1:3]:
            assert board.poll() is None
            assert str(board.pid).encode() in run("ps").stdout
    finally:
        for board in boards:
            board.terminate()
            board.communicate()
    assert [entry.name for entry in runtime.iterdir()] == ["restored"]


@pytest.mark.parametrize("serial", ["stdio", "none"])
def test_without_its_reader_it_ends(serial: str, runtime: Path) -> None:
    """As errors.md says; and only if it writes there at all."""
    process = start("ledger", "--ram", "16M", "--serial", serial, "--append", "tick_ms=20")
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"QMP at" in process.stderr.readline()
        process.stdout.close()
        if serial == "stdio":
            assert process.wait(60) == 141
            assert process.stderr.read() == b""
            assert list(runtime.iterdir()) == []
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["show", "verify", "restore", "import", "run", "incoming", "disk"])
def test_sources_that_are_none(what: str, tmp_path: Path, runtime: Path) -> None:
    """The same code for the same fault, whoever reads."""
    (tmp_path / "d").mkdir()
    words = {
        "show": ("show",),
        "verify": ("verify",),
        "restore": ("restore",),
        "import": ("import", "-o", tmp_path / "out"),
        "run": ("board", "run"),
        "incoming": ("board", "run", "--incoming"),
        "disk": ("board", "run", "ledger", "--disk"),
    }[what]
    for name, code in (("none", 9), ("d", 2), ("", 2)):
        if name or what not in ("show", "verify", "restore", "import"):
            done = run(*words, tmp_path / name if name else "")
            assert done.returncode == code, done.stderr
            assert done.stderr.count(b"\n") == 1
            assert b"Errno" not in done.stderr


def test_sources_that_may_not_be_read(ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    secret = ordinary_user.home / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0)
    for words in (
        ("show", secret),
        ("verify", secret),
        ("restore", secret),
        ("import", secret, "-o", ordinary_user.home / "out"),
        ("board", "run", secret),
        ("board", "run", "--incoming", secret),
        ("board", "run", "ledger", "--disk", secret),
    ):
        done = ordinary_user.run(*words)
        assert done.returncode == 5, (words, done.stderr)


def test_what_is_asked_for_is_looked_at_first(tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(513))
    (tmp_path / "empty").touch()
    for words, code, told in (
        (("--display", tmp_path / "no/x.png"), 7, b"make the directory first"),
        (("--display", tmp_path), 2, b"not a regular file"),
        (("--serial", f"unix:{tmp_path}/{'x' * 120}"), 2, b"too long"),
        (("--disk", tmp_path / "odd"), 2, b"513 bytes"),
        (("--disk", tmp_path / "empty"), 2, b"0 bytes"),
        (("--disk", "/dev/null"), 2, b"neither a regular file nor a block device"),
        (("--resolution", "5000x1"), 2, b"1 to 4096 pixels"),
    ):
        done = run("board", "run", "ledger", *words)
        assert done.returncode == code, (words, done.stderr)
        assert told in done.stderr
        assert b"QMP at" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, b"a board needs a guest; name an ELF file, or one of ledger, life, writer"),
        (("nothing.elf",), 9, b"or one of ledger, life, writer"),
        (("ledger", "--ram", "16"), 2, b"--ram"),
        (("ledger", "--cpus", "9"), 2, b"--cpus"),
        (("ledger", "--serial", "/nonexistent/x"), 5, b"/nonexistent/x"),
        (("ledger", "--disk", "/nonexistent/x"), 9, b"/nonexistent/x"),
        (("ledger", "--qmp", "/nonexistent/x"), 2, b"/nonexistent/x"),
        (("ledger", "--incoming", "/nonexistent/x"), 9, b"/nonexistent/x"),
        (("ledger", "--resolution", "big"), 2, b"640x480"),
        (("ledger", "--display", "terminal"), 2, b"standard output is no terminal"),
        (("ledger", "--append", "speed=1"), 2, b""),
    ],
)
def test_what_cannot_be_run(words: tuple[str, ...], code: int, told: bytes, runtime: Path) -> None:
    done = run("board", "run", *words)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert b"Traceback" not in done.stderr
    assert not runtime.exists() or list(runtime.iterdir()) == []


def test_a_file_that_is_no_guest(tmp_path: Path) -> None:
    (tmp_path / "x.elf").write_bytes(b"no ELF at all")
    done = run("board", "run", tmp_path / "x.elf")
    assert done.returncode == 8
    assert done.stderr.count(b"\n") == 1


def test_without_the_engine(tmp_path: Path) -> None:
    """The extra ``board`` is not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['unicorn'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    for words in (("board", "run", "ledger"), ("demo",)):
        done = run(*words, env=env)
        assert done.returncode == 5
        assert done.stderr.count(b"\n") == 1
        assert b"pip install 'stillframe[board]'" in done.stderr
    assert run("ps", env=env).returncode == 0


# Pictures


def _picture(path: Path) -> tuple[int, int, bytes]:
    """Width, height and rows of a PNG without interlacing."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack_from(">II", data, 16)
    at, content = 8, b""
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            content += data[at + 8 : at + 8 + length]
        at += 12 + length
    return width, height, zlib.decompress(content)


def test_the_picture_goes_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "life.png"
    process = start("life", "--display", path, "--resolution", "160x120", "--serial", "none")
    try:
        assert process.stderr is not None
        assert b"QMP at" in process.stderr.readline()
        process.send_signal(signal.SIGUSR1)
        wait_until(path.exists)
        first = _picture(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert first[:2] == (160, 120)

        def is_another() -> bool:
            process.send_signal(signal.SIGUSR1)
            return _picture(path)[2] != first[2]

        wait_until(is_another, "the guest does not go on")
        path.unlink()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert _picture(path)[:2] == (160, 120)  # it was written at the end, too
    finally:
        process.kill()
        process.communicate()


def test_the_picture_of_a_board_that_is_told_to_quit(tmp_path: Path) -> None:
    path, socket = tmp_path / "life.png", tmp_path / "qmp"
    process = start("life", "--display", path, "--qmp", socket, "--serial", "none")
    try:
        assert process.stderr is not None
        assert b"QMP at" in process.stderr.readline()
        with QmpClient.connect(str(socket)) as qmp:
            qmp.execute("quit")
        assert process.wait(60) == 0
        assert _picture(path)[:2] == (640, 480)
    finally:
        process.kill()
        process.communicate()


def test_the_picture_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"}
    env.pop("NO_COLOR", None)
    process = start("life", "--display", "terminal", "--append", "tick_ms=100",
                    stdin=theirs, stdout=theirs, env=env)  # fmt: skip
    try:
        seen = _read(ours, lambda seen: seen.count("▀".encode()) >= 500 and b"tick" in seen)
        process.send_signal(signal.SIGINT)
        # The scrolling region is given back; before, there may be more than a terminal holds.
        seen += _read(ours, lambda seen: b"\x1b[r" in seen)
        assert process.wait(60) == 130
        assert b"life ready" in seen
    finally:
        process.kill()
        process.communicate()
        os.close(theirs)
        os.close(ours)


def _read(fd: int, enough: Callable[[bytes], bool]) -> bytes:
    """Read a terminal until there is enough."""
    seen = b""
    deadline = time.monotonic() + 60
    while not enough(seen):
        assert time.monotonic() < deadline, seen
        if select.select([fd], [], [], 1)[0]:
            seen += os.read(fd, 65536)
    return seen


# What comes in


def test_incoming_from_a_snapshot_a_stream_and_a_socket(tmp_path: Path) -> None:
    with ledger("--cpus", 2, "--ram", "24M", directory=tmp_path, name="source") as source:
        taken = run("take", source.pid, "-o", tmp_path / "a.still", "-q", "--json")
        assert taken.returncode == 0, taken.stderr
        out = tmp_path / "a.stream"
        assert run("export", tmp_path / "a.still", "--format", "qemu", "-o", out).returncode == 0
        for count, incoming in enumerate((tmp_path / "a.still", out, f"file:{out}")):
            words = ("ledger", "--cpus", 2, "--ram", "24M", "--incoming", incoming)
            with BoardProcess(*words, directory=tmp_path, name=f"copy{count}") as copy:
                assert copy.audit().startswith("AUDIT ok")
        words = ("ledger", "--cpus", 2, "--ram", "24M", "--incoming", f"unix:{tmp_path}/m")
        with BoardProcess(*words, directory=tmp_path, name="moved") as moved:
            console = moved.console
            with QmpClient.connect(str(source.qmp)) as qmp:
                qmp.execute("migrate", {"uri": f"unix:{tmp_path}/m"})
                wait_until(lambda: qmp.execute("query-status")["status"] == "postmigrate")  # type: ignore[index]
            console.wait("tick")
            assert moved.audit().startswith("AUDIT ok")


def test_incoming_that_is_damaged(tmp_path: Path) -> None:
    with ledger("--ram", "16M", directory=tmp_path, name="source") as source:
        path = tmp_path / "a.still"
        assert run("take", source.pid, "-o", path, "-q").returncode == 0
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = run("board", "run", "ledger", "--ram", "16M", "--incoming", path, "--serial", "none")
    assert done.returncode == 8, done.stderr
    assert b"Traceback" not in done.stderr
    done = run("board", "run", "ledger", "--ram", "16M", "--incoming", tmp_path / "none.still")
    assert done.returncode == 9


def test_a_snapshot_brings_its_board_along(tmp_path: Path) -> None:
    """RAM, vCPUs, guest and name; not its sockets and files."""
    words = ("--ram", "20M", "--cpus", "2", "--resolution", "64x48", "--disk", tmp_path / "disk")
    (tmp_path / "disk").write_bytes(bytes(4096))
    with ledger(*words, directory=tmp_path, name="source") as source:
        assert run("take", source.pid, "-o", tmp_path / "a.still", "-q").returncode == 0
    process = start(
        "--incoming", tmp_path / "a.still", "--disk", tmp_path / "disk", stdin=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"stillframe: board source (process ")
        listed = json.loads(run("ps", "--json").stdout)
        (found,) = (vm for vm in listed if vm["pid"] == process.pid)
        assert (found["name"], found["ram_bytes"]) == ("source", 20 << 20)
        process.stdin.write(b"a\nq\n")
        process.stdin.flush()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert b"AUDIT ok" in out
    finally:
        process.kill()
        process.communicate()


def test_a_stream_tells_its_hardware(tmp_path: Path) -> None:
    """``migrate`` to a file, then ``import``: nothing of the board needs to be said again."""
    words = ("--ram", "20M", "--cpus", "2", "--resolution", "64x48")
    with ledger(*words, directory=tmp_path, name="source") as source:
        with QmpClient.connect(str(source.qmp)) as qmp:
            wanted = {"capability": "background-snapshot", "state": True}
            qmp.execute("migrate-set-capabilities", {"capabilities": [wanted]})
            qmp.execute("migrate", {"uri": f"file:{tmp_path}/s"})
            wait_until(lambda: qmp.execute("query-migrate")["status"] == "completed")  # type: ignore[index]
        assert run("import", tmp_path / "s", "-o", tmp_path / "s.still").returncode == 0
    with BoardProcess("--incoming", tmp_path / "s.still", directory=tmp_path, name="copy") as copy:
        assert copy.audit().startswith("AUDIT ok")
    serial = tmp_path / "serial"
    done = run("restore", tmp_path / "s.still", "--json", "--", "--serial", f"unix:{serial}")
    assert done.returncode == 0, done.stderr
    vm = json.loads(done.stdout)
    try:
        assert vm["name"] == "board"
        console = Console(serial)
        console.send("a")
        assert console.wait("AUDIT").startswith("AUDIT ok")
    finally:
        end(vm["pid"])
        shutil.rmtree(vm["directory"])
    core = tmp_path / "core"
    assert run("export", tmp_path / "s.still", "--format", "elf", "-o", core).returncode == 0
    assert core.read_bytes()[:4] == b"\x7fELF"


def test_files_of_another_kind_are_told_apart(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "a.still", machine(()))
    assert run("export", path, "--format", "qemu", "-o", tmp_path / "a").returncode == 0
    for verb in ("show", "verify", "restore"):
        done = run(verb, tmp_path / "a")
        assert done.returncode == 8
        assert b"/a is a migration stream, not a snapshot file; convert it with" in done.stderr
    done = run("import", path, "-o", tmp_path / "b")
    assert done.returncode == 8
    assert b"a .still file is a snapshot already" in done.stderr
    for name in (tmp_path, path):
        done = run("take", name, "-o", tmp_path / "b")
        assert done.returncode == 2
        assert f"{name} is no socket".encode() in done.stderr


def test_a_snapshot_of_something_else(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "a.still", machine(()))
    done = run("board", "run", "--incoming", path)
    assert done.returncode == 8
    assert b"is no snapshot of a board" in done.stderr
    assert b"stillframe restore" in done.stderr


def test_incoming_without_its_guest(tmp_path: Path) -> None:
    """The guest is in the stream; its file is for a reset only."""
    guest = tmp_path / "own.elf"
    shutil.copy(guest_path("ledger"), guest)
    options = "rate=20 tick_ms=100"
    words = (guest, "--ram", "16M", "--append", options)
    with BoardProcess(*words, directory=tmp_path, name="source") as source:
        console = source.console
        console.wait("tick")
        assert run("take", source.pid, "-o", tmp_path / "a.still", "-q").returncode == 0
        instant = source.transfers()
    guest.unlink()
    words = ("--incoming", tmp_path / "a.still", "--paused")
    with BoardProcess(*words, directory=tmp_path, name="copy") as copy:
        console = copy.console
        with QmpClient.connect(str(copy.qmp)) as qmp:
            wait_until(lambda: qmp.execute("query-status")["status"] == "paused")  # type: ignore[index]
            qmp.execute("cont")
        assert transfers(console.wait("tick")) <= instant + 10_000
        assert copy.audit().startswith("AUDIT ok")
