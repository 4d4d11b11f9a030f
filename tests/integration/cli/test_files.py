"""``show``, ``verify``, ``export`` and ``import``, of sound files and of others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from guests.qemu import GuestVm
from tests.integration.cli.program import (
    PROGRAM,
    left_in,
    run,
    start,
)

pytestmark = pytest.mark.qemu


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


def test_import_into_the_store(snapshot: Path, tmp_path: Path) -> None:
    stream, store = tmp_path / "a.qemu", ("--store", tmp_path / "store")
    assert run("export", snapshot, "--format", "qemu", "-o", stream).returncode == 0
    done = run("import", stream, *store)
    assert (done.returncode, done.stderr.count(b"\n")) == (9, 1)  # there is none
    assert run("init", tmp_path / "store").returncode == 0
    done = run("import", stream, *store, "--tag", "old", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert Path(shown["file"]).parent == tmp_path / "store" / "snapshots"
    (listed,) = json.loads(run("ls", *store, "--json").stdout)
    assert (listed["id"], listed["vm"], listed["tags"]) == (shown["id"], "import", ["old"])
    piped = run("export", "import@old", *store, "--format", "qemu", "-o", "-")
    assert piped.returncode == 0, piped.stderr
    assert run("import", "-", *store, content=b"no stream").returncode == 8
    assert run("import", stream, "-o", tmp_path / "x.still", "--tag", "a").returncode == 2
    assert len(json.loads(run("ls", *store, "--json").stdout)) == 1
    assert left_in(tmp_path / "store" / "pending") == []
    sealed = ("--store", tmp_path / "sealed")
    env = os.environ | {"STILLFRAME_PASSWORD": "word"}
    assert run("init", tmp_path / "sealed", "--encrypt", env=env).returncode == 0
    done = run("import", stream, *sealed, env=env)
    assert done.returncode == 0, done.stderr
    assert run("verify", "import@latest", *sealed, env=env).returncode == 0
    assert run("show", "import@latest", *sealed).returncode == 12


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
        done = run(*words, content=content)
        assert done.returncode == 8, done.stderr
        assert done.stderr.count(b"\n") == 1
    assert run("import", tmp_path / "none", "-o", tmp_path / "a.still").returncode == 9
    assert left_in(tmp_path) == []


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
