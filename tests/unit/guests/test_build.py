"""How the guests' parts are built, found and cached; no VM is started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from guests.build import built, cache_directory, run_tool
from guests.initramfs import Entry, newc_archive
from guests.kernel import find_kernel
from guests.qemu import GuestVm, qemu_binary
from stillframe.errors import HostError, UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STILLFRAME_KERNEL", raising=False)


def programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Make a PATH of these shell scripts and nothing else; ``_`` in names stands for ``-``."""
    directory.mkdir(exist_ok=True)
    for name, script in scripts.items():
        program = directory / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def no_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the host's own kernels."""
    real = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda path, what: iter(()) if path == Path("/boot") else real(path, what)
    )


def test_newc_archive_has_the_layout_of_the_kernels_document() -> None:
    archive = newc_archive([Entry("init", 0o100755, b"12345")])
    fields = [int(archive[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert archive[:6] == b"070701"
    assert fields[1] == 0o100755
    assert fields[4] == 1
    assert fields[6] == 5
    assert fields[11] == len("init") + 1
    assert archive[110:115] == b"init\0"
    assert archive[116:121] == b"12345"
    assert archive[124:130] == b"070701"
    assert b"TRAILER!!!\0" in archive
    assert len(archive) % 4 == 0


def test_built_makes_once_per_content(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    calls = []

    def make(scratch: Path, output: Path) -> None:
        calls.append(scratch)
        output.write_bytes(source.read_bytes())

    first = built("thing", [source], make)
    assert built("thing", [source], make) == first
    assert len(calls) == 1
    source.write_text("two")
    second = built("thing", [source], make)
    assert (first.read_text(), second.read_text()) == ("one", "two")
    assert not any(scratch.exists() for scratch in calls)
    assert sorted(first.parent.iterdir()) == sorted([first, second])


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch)
    with pytest.raises(HostError, match=r"there is no gcc; install it .*apt-get install gcc"):
        run_tool(["gcc", "x.c"], "build the guest", package="gcc")


def test_a_failing_tool_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, gcc="echo no such header >&2; exit 4")
    with pytest.raises(HostError, match="gcc failed with exit code 4: no such header"):
        run_tool(["gcc"], "build the guest", package="gcc")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="cannot make the cache directory"):
        cache_directory("kernel")


def test_a_named_kernel_wins_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "bzImage"
    kernel.touch()
    monkeypatch.setenv("STILLFRAME_KERNEL", str(kernel))
    assert find_kernel() == kernel
    kernel.unlink()
    with pytest.raises(HostError, match=r"STILLFRAME_KERNEL names .* not a readable file"):
        find_kernel()


def test_the_newest_cached_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    no_boot(monkeypatch)
    cache = cache_directory("kernel")
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-60-cloud-amd64"):
        (cache / f"vmlinuz-{version}").touch()
    assert find_kernel().name == "vmlinuz-6.1.0-56-cloud-amd64"


def test_no_apt_and_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_boot(monkeypatch)
    programs(tmp_path / "bin", monkeypatch)
    with pytest.raises(HostError, match=r"there is no apt-get to fetch one; .*STILLFRAME_KERNEL"):
        find_kernel()


def test_apt_without_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_boot(monkeypatch)
    programs(
        tmp_path / "bin", monkeypatch, apt_get="", dpkg_deb="", apt_cache="echo N: none; exit 100"
    )
    with pytest.raises(HostError, match=r"does not know the package .*; run 'apt-get update'"):
        find_kernel()


def test_apt_that_cannot_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_boot(monkeypatch)
    programs(
        tmp_path / "bin",
        monkeypatch,
        apt_get="echo 'W: hm' >&2; echo 'E: Failed to fetch' >&2; exit 100",
        dpkg_deb="",
        apt_cache="echo '  Depends: linux-image-6.1.0-56-cloud-amd64'",
    )
    with pytest.raises(HostError, match="E: Failed to fetch; run 'apt-get update'"):
        find_kernel()
    assert list(cache_directory("kernel").iterdir()) == []


def test_a_kernel_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_boot(monkeypatch)
    log = tmp_path / "log"
    programs(
        tmp_path / "bin",
        monkeypatch,
        apt_get=f"echo $1 $2 >> {log}; touch $2.deb",
        apt_cache="echo '  Depends: linux-image-6.1.0-56-cloud-amd64'",
        dpkg_deb="mkdir -p $3/boot; touch $3/boot/vmlinuz-6.1.0-56-cloud-amd64",
    )
    kernel = find_kernel()
    assert kernel == cache_directory("kernel") / "vmlinuz-6.1.0-56-cloud-amd64"
    assert find_kernel() == kernel
    assert log.read_text() == "download linux-image-6.1.0-56-cloud-amd64\n"
    assert list(kernel.parent.iterdir()) == [kernel]


def test_a_guest_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="do not fit into 256 MiB"):
        GuestVm(ram_mib=256, mem_mib=200, populate_mib=56)
    with pytest.raises(UsageError, match="does not boot in 64 MiB"):
        GuestVm(ram_mib=64, mem_mib=8)
    with pytest.raises(UsageError, match="was not started"):
        _ = GuestVm().qmp_path


def test_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, qemu_mine="")
    with pytest.raises(HostError, match="there is no program qemu-system-x86_64; install QEMU"):
        qemu_binary()
    monkeypatch.setenv("STILLFRAME_QEMU", "qemu-mine")
    assert Path(qemu_binary()).name == "qemu-mine"
    assert subprocess.run([qemu_binary()], check=False, env=os.environ).returncode == 0
