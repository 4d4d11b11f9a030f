"""Symbols of programs built on the spot, and files that are no programs."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.machine.qemu.elf_symbols import ElfError, ElfFile, symbol_address

COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCE = """
#include <stdio.h>
#include <unistd.h>
long still_wanted = 0x5717;
int main(void) { printf("%p\\n", (void *)&still_wanted); fflush(stdout); pause(); return 0; }
"""
BUILDS = {
    "pie": ["-fPIE", "-pie", "-rdynamic"],
    "fixed": ["-no-pie", "-fno-pie", "-rdynamic"],
    "sysv-hash": ["-fPIE", "-pie", "-rdynamic", "-Wl,--hash-style=sysv"],
    "not-exported": ["-fPIE", "-pie"],
}


@contextmanager
def running(directory: Path, flags: list[str]) -> Iterator[tuple[int, int]]:
    """pid of a program with ``still_wanted``, and where it says that lies."""
    if COMPILER is None:
        pytest.skip("missing compiler: no cc or gcc in the PATH")
    source, program = directory / "p.c", directory / "p"
    source.write_text(SOURCE)
    subprocess.run([COMPILER, "-o", program, source, *flags], check=True, capture_output=True)
    process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline(), 16)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("build", ["pie", "fixed", "sysv-hash"])
def test_an_exported_symbol_is_found(build: str, tmp_path: Path) -> None:
    with running(tmp_path, BUILDS[build]) as (pid, address):
        assert symbol_address(pid, "still_wanted") == address
        assert symbol_address(pid, "still_want") is None
        assert symbol_address(pid, "pause") is None, "needed, but defined elsewhere"


def test_a_symbol_that_is_not_exported(tmp_path: Path) -> None:
    with running(tmp_path, BUILDS["not-exported"]) as (pid, _address):
        assert symbol_address(pid, "still_wanted") is None


def test_a_program_replaced_on_disk_is_still_read(tmp_path: Path) -> None:
    with running(tmp_path, BUILDS["pie"]) as (pid, address):
        (tmp_path / "p").unlink()
        (tmp_path / "p").write_text("another")
        assert symbol_address(pid, "still_wanted") == address


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(OSError, match="No such"):
        symbol_address(process.pid, "x")


def look_up(data: bytes, directory: Path) -> int | None:
    path = directory / "elf"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return ElfFile(fd).find("still_wanted")
    finally:
        os.close(fd)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n" * 99, b"\x7fELF\x01\x01" * 99])
def test_what_is_no_elf64(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ElfError):
        look_up(data, tmp_path)


def test_damaged_files_end_in_an_answer_and_soon(tmp_path: Path) -> None:
    """Whatever stands in headers and tables: an ElfError or a result, and no long walk."""
    with running(tmp_path, BUILDS["pie"]):
        good = (tmp_path / "p").read_bytes()
    assert look_up(good, tmp_path) is not None
    draw = random.Random(7)
    failures = 0
    began = time.process_time()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(draw.randint(1, 8)):
            # headers, then the tables behind them
            data[draw.randrange(64 if draw.random() < 0.5 else 4096)] = draw.randrange(256)
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        try:
            look_up(bytes(data), tmp_path)
        except ElfError:
            failures += 1
    assert failures > 50
    assert time.process_time() - began < 20
