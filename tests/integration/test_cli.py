"""The command line as a user runs it: a program, on pipes and on a terminal, on a real guest."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.qemu import GuestVm, qemu_binary
from tests.support.guest_fixtures import GuestFactory
from tests.support.probes import has_linux_guest, has_qemu, has_uffd_wp

pytestmark = pytest.mark.qemu

TAKE_KEYS: dict[str, Any] = {
    "id": str,
    "file": str,
    "downtime_ms": float,
    "downtime": {"stop_ms", "devices_ms", "disks_ms", "protect_ms", "cont_ms"},
    "arm_ms": float,
    "total_ms": float,
    "ram_bytes": int,
    "file_bytes": int,
    "pages": {"total", "zero", "data", "faulted", "never_populated"},
    "faults": int,
    "fault_p50_us": float,
    "fault_p99_us": float,
    "fault_max_us": float,
    "stall_ms": float,
    "writes_while_stopped": list,
}
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
PROGRAM = (sys.executable, "-m", "stillframe")
SLOW = ("--max-bandwidth", "1M")
"""The snapshot of the guest below then takes half a minute."""


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run stillframe to its end."""
    options = {"timeout": 120} | options
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    if "stdout" not in options:
        options["capture_output"] = True
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [*PROGRAM, *map(str, words)], **options
    )
    return done


def start(*words: object) -> subprocess.Popen[bytes]:
    """Start stillframe on pipes."""
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # so that select tells of every line
    )


@pytest.fixture(scope="module")
def guest() -> Iterator[GuestVm]:
    """A guest with 64 MiB of data that does not compress."""
    has_uffd_wp().require()
    has_linux_guest().require()
    name = f"cli-test-{os.getpid()}"
    with GuestVm("linux", ram_mib=192, mem_mib=16, populate_mib=48, name=name).start() as vm:
        yield vm


@pytest.fixture(scope="module")
def snapshot(guest: GuestVm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the guest."""
    path = tmp_path_factory.mktemp("cli") / "a.still"
    done = run("take", guest.name, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def odd_vm() -> Iterator[str]:
    """QMP address of a stopped VM, without a guest, that cannot be snapshotted for two reasons."""
    has_qemu().require()
    directory = Path(tempfile.mkdtemp(prefix="stillframe-cli-"))
    socket = directory / "qmp"
    command = [qemu_binary(), "-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg"]
    command += ["-m", "32M", "-display", "none", "-S", "-qmp", f"unix:{socket},server=on,wait=off"]
    command += ["-device", "virtio-balloon-pci,free-page-reporting=on"]
    command += ["-object", "memory-backend-ram,id=peer,size=1M,share=on"]
    command += ["-device", "ivshmem-plain,memdev=peer,master=off"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        yield str(socket)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def on_terminal(
    *words: object, environment: dict[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    """Run stillframe with standard error on a terminal: (exit code, stdout, stderr)."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": "120"} | (environment or {})
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    seen = _read_terminal(ours)
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, out, seen


def _read_terminal(fd: int) -> bytes:
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 1.0)[0]:
            try:
                part = os.read(fd, 65536)
            except OSError:  # EIO: the other side is closed
                return seen
            if not part:
                return seen
            seen += part
    raise AssertionError(f"the program did not end: {seen!r}")


def left_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# take


def test_take_piped(guest: GuestVm, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    done = run("take", guest.name, "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    for key, kind in TAKE_KEYS.items():
        if isinstance(kind, set):
            assert set(shown[key]) == kind
        else:
            assert isinstance(shown[key], kind), key
    assert set(shown) - set(TAKE_KEYS) == {"notes", "spill_peak_bytes"}
    assert shown["file"] == str(path)
    assert shown["file_bytes"] == path.stat().st_size
    assert shown["downtime_ms"] == pytest.approx(sum(shown["downtime"].values()))
    assert shown["pages"]["total"] * 4096 >= shown["ram_bytes"] >= 192 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if line.startswith("stillframe: saving")]
    assert all(line.startswith("stillframe: ") for line in lines)
    assert b"\x1b" not in done.stdout + done.stderr
    assert guest.is_progressing()


def test_take_for_people(guest: GuestVm, tmp_path: Path) -> None:
    done = run("take", guest.qmp_path, "-o", tmp_path / "a.still", "--quiet")
    assert done.returncode == 0
    assert done.stderr == b""
    text = done.stdout.decode()
    assert re.search(r"^downtime +\d+\.\d ms \(stop .*cont .*\)$", text, re.MULTILINE)
    assert re.search(r"^id +[0-9a-f]{64}$", text, re.MULTILINE)


def test_take_on_a_terminal(guest: GuestVm, tmp_path: Path) -> None:
    words = ("take", guest.process.pid, "--max-bandwidth", "40M", "-o")
    code, out, seen = on_terminal(*words, tmp_path / "a.still")
    assert code == 0, seen
    assert b"\x1b" not in out
    assert COLOUR.search(seen)
    assert b"saving" in seen
    assert b"faults, spill" in seen
    code, out, seen = on_terminal(*words, tmp_path / "b.still", environment={"NO_COLOR": "1"})
    assert code == 0
    assert b"saving" in seen
    assert not [part for part in COLOUR.findall(seen) if re.search(rb"[34]\d|38;", part)]
    code, out, seen = on_terminal(*words, tmp_path / "c.still", environment={"TERM": "dumb"})
    assert code == 0
    assert b"stillframe: saving" in seen
    assert b"\x1b" not in seen


def test_take_to_a_pipe(guest: GuestVm, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    with path.open("wb") as out:
        done = run(
            "take", guest.name, "-o", "-", "--json", "-q", stdout=out, stderr=subprocess.PIPE
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr)["file"] == "standard output"
    assert run("verify", path).returncode == 0


def test_take_not_to_a_terminal(guest: GuestVm) -> None:
    ours, theirs = pty.openpty()
    done = run("take", guest.name, "-o", "-", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert b"standard output is a terminal; send it to a file or a pipe" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_cancel(number: signal.Signals, guest: GuestVm, tmp_path: Path) -> None:
    process = start("take", guest.name, "-o", tmp_path / "a.still", *SLOW)
    _wait_for(process, b"saving")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == b""
    lines = err.decode().splitlines()
    assert lines[0] == "stillframe: cancelling; the guest goes on"
    assert lines[-1] == "stillframe: the snapshot was cancelled [guest running]"
    assert left_in(tmp_path) == []
    assert guest.is_progressing()


def test_a_second_ctrl_c(guest: GuestVm, tmp_path: Path) -> None:
    # The job hangs at a fault point for a minute, so that the second one comes in time.
    process = subprocess.Popen(
        [*PROGRAM, "take", str(guest.name), "-o", tmp_path / "a.still"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"STILLFRAME_FAULT": "attached=hang"},
    )
    try:
        _wait_for(process, b"attaching")
        process.send_signal(signal.SIGINT)
        _wait_for(process, b"cancelling")
        process.send_signal(signal.SIGINT)
        _wait_for(process, b"already cancelling; please wait")
    finally:
        process.kill()
        process.communicate()
    assert left_in(tmp_path) == []
    assert guest.is_progressing()


def _wait_for(process: subprocess.Popen[bytes], words: bytes) -> None:
    assert process.stderr is not None
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([process.stderr], [], [], 1.0)[0]:
            line = process.stderr.readline()
            if words in line:
                return
            assert line, f"it ended before {words!r}"
    raise AssertionError(f"no {words!r} in time")


def test_the_second_snapshotter(guest: GuestVm, tmp_path: Path) -> None:
    first = start("take", guest.name, "-o", tmp_path / "a.still", *SLOW)
    try:
        _wait_for(first, b"saving")
        done = run("take", guest.name, "-o", tmp_path / "b.still", "-q")
        assert done.returncode == 4
        assert done.stderr.startswith(b"stillframe: ")
        assert done.stderr.count(b"\n") == 1
    finally:
        first.terminate()
        first.communicate(timeout=30)
    assert left_in(tmp_path) == []


def test_an_internal_error(guest: GuestVm, tmp_path: Path) -> None:
    env = os.environ | {"STILLFRAME_FAULT": "armed"}
    done = run("take", guest.name, "-o", tmp_path / "a.still", "-q", env=env)
    assert done.returncode == 70
    assert b"[guest running]" in done.stderr
    assert b"Traceback" not in done.stderr
    done = run("take", guest.name, "-o", tmp_path / "a.still", env=env | {"STILLFRAME_DEBUG": "1"})
    assert b"Traceback" in done.stderr
    assert left_in(tmp_path) == []
    assert guest.is_progressing()


# What cannot be done


def test_no_such_vm(tmp_path: Path) -> None:
    for name in ("no-such-vm", "/no/such/socket", "2147483647"):
        done = run("take", name, "-o", tmp_path / "a.still", "-q")
        assert done.returncode == 9, done.stderr
        assert done.stderr.count(b"\n") == 1
    assert run("doctor", "no-such-vm").returncode == 9
    assert left_in(tmp_path) == []


def test_the_file_exists(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    path.write_bytes(b"precious")
    done = run("take", guest.name, "-o", path, "-q", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "usage"
    assert path.read_bytes() == b"precious"
    assert run("export", snapshot, "--format", "qemu", "-o", path).returncode == 2
    assert path.read_bytes() == b"precious"
    assert run("take", guest.name, "-o", path, "-q", "--force").returncode == 0
    assert run("verify", path).returncode == 0


def test_no_directory(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.still"
    for words in (("take", guest.name), ("export", snapshot, "--format", "raw")):
        done = run(*words, "-o", path, "-q")
        assert done.returncode == 7
        assert b"make the directory first" in done.stderr


def test_bad_sizes_touch_nothing(tmp_path: Path) -> None:
    for option in (("--spill", "-1"), ("--max-bandwidth", "0"), ("--spill", "a lot")):
        done = run("take", "no-such-vm", "-o", tmp_path / "a.still", *option)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1


def test_not_readable(snapshot: Path) -> None:
    # Everything is imported before root gives up its powers, which a fresh Python may need.
    code = """if True:
        import os, sys
        from stillframe.cli.main import main
        main(["show", sys.argv[1]])
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        os.chdir(os.path.dirname(sys.argv[2]))
        sys.exit(main(["show", os.path.basename(sys.argv[2])]))
    """
    with tempfile.TemporaryDirectory(prefix="stillframe-cli-") as place:
        os.chmod(place, 0o755)
        secret = Path(place) / "secret.still"
        shutil.copy(snapshot, secret)
        secret.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", code, snapshot, secret], capture_output=True, timeout=60
        )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(b"stillframe: cannot read")
    assert b"Permission denied" in done.stderr


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no snapshot\n" * 1000)
    for name, code in (("missing", 9), ("empty", 8), ("text", 8), (".", 2)):
        for verb in ("show", "verify"):
            done = (
                run(verb, tmp_path / name, "-q") if verb == "verify" else run(verb, tmp_path / name)
            )
            assert done.returncode == code, (name, done.stderr)
            assert done.stderr.count(b"\n") == 1


def test_truncated_and_flipped(snapshot: Path, tmp_path: Path) -> None:
    whole = snapshot.read_bytes()
    broken = tmp_path / "broken.still"
    broken.write_bytes(whole[: len(whole) // 2])
    for words in (("show",), ("verify", "-q"), ("export", "-q", "--format=qemu", "-o-")):
        done = run(*words, broken)
        assert done.returncode == 8, done.stderr
        assert done.stderr.count(b"\n") == 1
    middle = len(whole) // 2
    broken.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    done = run("verify", broken, "-q", "--json")
    assert done.returncode == 8
    assert json.loads(done.stdout)["error"] == "data"


def test_a_vm_that_is_refused(odd_vm: str, tmp_path: Path) -> None:
    done = run("take", odd_vm, "-o", tmp_path / "a.still", "-q", "--json")
    assert done.returncode == 3, done.stderr
    shown = json.loads(done.stdout)
    assert shown["error"] == "refused"
    names = [reason["name"] for reason in shown["reasons"]]
    assert {"migration-blocker", "free-page-reporting"} <= set(names)
    assert len(done.stderr.splitlines()) == len(names)
    assert left_in(tmp_path) == []
    done = run("doctor", odd_vm)
    assert done.returncode == 3
    assert b"free-page-reporting" in done.stdout
    assert b"\x1b" not in done.stdout


def test_the_vm_exits_midway(linux_guest: GuestFactory, tmp_path: Path) -> None:
    vm = linux_guest(ram_mib=128, mem_mib=16, populate_mib=32)
    process = start("take", vm.qmp_path, "-o", tmp_path / "a.still", *SLOW)
    _wait_for(process, b"saving")
    vm.process.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6, err
    assert b"Traceback" not in err
    assert left_in(tmp_path) == []


def test_no_room(guest: GuestVm, snapshot: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    for words in (("take", guest.name), ("export", snapshot, "--format", "elf")):
        done = run(*words, "-o", tmp_path / "a", "-q", preexec_fn=small_files)
        assert done.returncode == 7, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert left_in(tmp_path) == []
    assert guest.is_progressing()


# Reading snapshots


def test_show(snapshot: Path, guest: GuestVm) -> None:
    done = run("show", snapshot, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["machine"]["name"] == guest.name
    assert shown["machine_type"].startswith("pc-q35-")
    assert shown["file_bytes"] == snapshot.stat().st_size
    main_block = shown["blocks"][0]
    assert main_block["idstr"] == "ram0"
    assert main_block["pages"]["total"] == (192 << 20) // 4096
    assert main_block["pages"]["data"] * 4096 > 64 << 20
    assert main_block["pages"]["missing"] == 0
    assert {"cpu", "timer", "globalstate"} <= {device["idstr"] for device in shown["devices"]}
    text = run("show", snapshot).stdout.decode()
    assert re.search(r"^ram0 +192 MiB +49152 ", text, re.MULTILINE)
    assert re.search(r"^0000:00:1f.2/ich9_ahci +0 +1 +\d+$", text, re.MULTILINE)


def test_verify(snapshot: Path) -> None:
    done = run("verify", snapshot, "--json")
    assert done.returncode == 0
    shown = json.loads(done.stdout)
    assert shown["sound"] is True
    assert shown["pages"]["missing"] == 0
    assert shown["id"] == json.loads(run("show", snapshot, "--json").stdout)["id"]
    assert b"result" in run("verify", snapshot).stdout


def test_the_reader_went_away(snapshot: Path) -> None:
    for words in (("show", snapshot), ("--help",)):
        process = start(*words)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
        process.stderr.close()


def test_closed_standard_streams(snapshot: Path, tmp_path: Path) -> None:
    program = " ".join(f"'{word}'" for word in PROGRAM)
    path = tmp_path / "a.raw"
    command = f"{program} export '{snapshot}' --format raw --block pc.bios -o '{path}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
    assert path.stat().st_size == 256 << 10


def test_export_and_import(snapshot: Path, tmp_path: Path) -> None:
    stream, again = tmp_path / "a.qemu", tmp_path / "b.still"
    done = run("export", snapshot, "--format", "qemu", "-o", stream, "--json")
    assert json.loads(done.stdout)["written_bytes"] == stream.stat().st_size
    piped = run("export", snapshot, "--format", "qemu", "-o", "-")
    assert piped.stdout == stream.read_bytes()
    assert piped.stdout.startswith(b"QEVM")
    done = run("import", stream, "-o", again, "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"id", "file"}
    assert run("verify", again).returncode == 0
    again.unlink()
    with stream.open("rb") as source:
        assert run("import", "-", "-o", again, stdin=source).returncode == 0
    assert run("verify", again).returncode == 0


def test_export_one_block(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "bios"
    words = ("export", snapshot, "--format", "raw", "-o")
    assert run(*words, path, "--block", "pc.bios").returncode == 0
    assert path.stat().st_size == 256 << 10
    assert run(*words, tmp_path / "x", "--block", "nope").returncode == 9
    elf = ("export", snapshot, "--format", "elf", "--block", "pc.bios", "-o", tmp_path / "x")
    assert run(*elf).returncode == 2
    assert left_in(tmp_path) == ["bios"]


def test_import_what_is_no_stream(tmp_path: Path) -> None:
    for content in (b"", b"QEVM", os.urandom(100_000)):
        words = ("import", "-", "-o", tmp_path / "a.still", "-q")
        done = run(*words, input=content)
        assert done.returncode == 8, done.stderr
        assert done.stderr.count(b"\n") == 1
    assert run("import", tmp_path / "none", "-o", tmp_path / "a.still").returncode == 9
    assert left_in(tmp_path) == []


# restore


def test_restore(snapshot: Path, tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    done = run("restore", snapshot, "--qmp", socket, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    try:
        assert shown["state"] == "running"
        assert shown["qmp"] == str(socket)
        ours = [vm for vm in json.loads(run("ps", "--json").stdout) if vm["pid"] == shown["pid"]]
        assert ours[0]["qmp"] == [str(socket)]
        again = run("take", shown["pid"], "-o", tmp_path / "again.still", "-q")
        assert again.returncode == 0, again.stderr
    finally:
        os.kill(shown["pid"], signal.SIGKILL)
        shutil.rmtree(shown["directory"])


def test_restore_dry_run(snapshot: Path) -> None:
    done = run("restore", snapshot, "--dry-run", "--json", "--", "-m", "1G")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["needs_trust"] == []
    assert shown["argv"][shown["argv"].index("-m") + 1] == "1G"
    assert [touch for touch in shown["touches"] if touch["access"] == "run"]
    assert not Path(shown["directory"]).exists()
    text = run("restore", snapshot, "--dry-run").stdout.decode()
    assert "-incoming" in text
    assert "it touches" in text


def test_restore_wants_trust(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.still"
    shutil.copy(snapshot, path)
    path.chmod(0o666)
    done = run("restore", path, "-q", "--json")
    assert done.returncode == 10
    assert json.loads(done.stdout)["error"] == "trust"
    assert b"--trust" in done.stderr
    assert run("restore", path, "--dry-run").returncode == 0


# The host and its VMs


def test_doctor(guest: GuestVm) -> None:
    done = run("doctor", guest.name, "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0, shown
    assert shown["fine"] is True
    by_name = {check["name"]: check for check in shown["checks"]}
    assert {"kernel", "userfaultfd", "ptrace", "attach", "memfd", "zstd", "space"} <= set(by_name)
    assert by_name["ram"]["subject"] == "vm"
    assert re.search(r"arming takes about \d+ ms", by_name["ram"]["found"])
    assert guest.is_progressing()


def test_ps(guest: GuestVm) -> None:
    def ours() -> dict[str, Any]:
        done = run("ps", "--json")
        assert done.returncode == 0, done.stderr
        return next(vm for vm in json.loads(done.stdout) if vm["pid"] == guest.process.pid)

    shown = _until(ours, lambda vm: vm["snapshotable"] is not None)
    assert shown["name"] == guest.name
    assert shown["snapshotable"] is True
    assert shown["ram_bytes"] == 192 << 20
    assert shown["qmp"] == [str(guest.qmp_path)]
    assert shown["accelerator"] == "tcg"
    assert re.fullmatch(r"\d+\.\d+\.\d+", shown["qemu_version"])
    text = run("ps").stdout.decode()
    assert text.splitlines()[0].split()[:2] == ["PID", "NAME"]
    assert str(guest.name) in text


def _until(
    look: Callable[[], dict[str, Any]], good: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Another process may hold the monitor for a moment."""
    found = look()
    for _ in range(5):
        if good(found):
            break
        time.sleep(0.5)
        found = look()
    return found
