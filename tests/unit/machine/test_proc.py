"""Mappings, sockets and processes, seen in this very process."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stillframe.errors import MachineError
from stillframe.kernel.proc_maps import (
    AddressSpace,
    Vma,
    file_system_types,
    parse_maps,
    read_maps,
    read_smaps,
)
from stillframe.machine.finding import parse_address, read_vm
from stillframe.machine.process.sockets import peer_pid, tcp_listener_pid, unix_listener_pids


def vma(start: int, end: int) -> Vma:
    return Vma(start, end, True, True, False, 0, (0, 0), 0, "")


def test_covering_wants_no_gap() -> None:
    space = AddressSpace([vma(0x3000, 0x5000), vma(0x1000, 0x3000), vma(0x6000, 0x7000)])
    assert space.covering(0x1000, 0x1000) == [vma(0x1000, 0x3000)]
    assert space.covering(0x2FFF, 2) == [vma(0x1000, 0x3000), vma(0x3000, 0x5000)]
    assert space.covering(0x1000, 0x4000) is not None
    assert space.covering(0x1000, 0x4001) is None
    assert space.covering(0x4000, 0x3000) is None, "a hole at 0x5000"
    assert space.covering(0, 0x2000) is None
    assert space.covering(0x9000, 1) is None
    assert AddressSpace([]).covering(0, 1) is None


def test_lines_of_maps() -> None:
    text = (
        b"7f0000000000-7f0000001000 rw-s 00002000 00:01 1234      /memfd:a b (deleted)\n"
        b"7f0000001000-7f0000002000 ---p 00000000 00:00 0 \n"
        b"this is no mapping\n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    )
    first, second, third = parse_maps(text)
    assert (first.shared, first.writable, first.offset_bytes) == (True, True, 0x2000)
    assert (first.device, first.inode, first.path) == ((0, 1), 1234, "/memfd:a b (deleted)")
    assert not second.readable
    assert third.path == "[vsyscall]"


def test_own_mappings_agree_in_both_files(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[0] = 1
        mine = [found for found in read_maps(os.getpid()).vmas if found.path == str(path)]
        assert [(m.length_bytes, m.shared, m.inode) for m in mine] == [
            (8192, True, path.stat().st_ino)
        ]
        detail = next(d for d in read_smaps(os.getpid()) if d.vma.path == str(path))
        assert detail.vma == mine[0]
        assert detail.page_size_bytes == mmap.PAGESIZE
        assert {"rd", "wr", "sh"} <= detail.flags
        assert not detail.flags & {"um", "uw", "ui"}
    types = file_system_types(os.getpid())
    assert types[os.major(os.stat("/proc").st_dev), os.minor(os.stat("/proc").st_dev)] == "proc"


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(MachineError, match="look whether the VM"):
        read_maps(process.pid)
    assert read_vm(process.pid) is None


def test_this_process_is_no_vm() -> None:
    assert read_vm(os.getpid()) is None
    taken = read_vm(os.getpid(), any_program=True)
    assert taken is not None
    assert taken.uid == os.getuid()
    assert taken.qmp_addresses == ()


def test_a_renamed_emulator_is_known_by_its_own_name_for_itself() -> None:
    pause = "import os, sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-c", pause, "-name", "not-really"],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.read(1)
        found = read_vm(process.pid)
        assert found is not None
        assert found.name == "not-really"
    finally:
        process.communicate()


def test_who_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert unix_listener_pids(path) == []
        listener.listen(1)
        assert unix_listener_pids(path) == [os.getpid()]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert peer_pid(client) == os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert tcp_listener_pid(port) == os.getpid()
        assert peer_pid(server) is None
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    with client, accepted:
        assert tcp_listener_pid(port) is None, "connected, but nobody listens any more"


@pytest.mark.parametrize(
    ("ref", "address"),
    [
        ("/run/q", "/run/q"),
        ("unix:/run/q", "/run/q"),
        ("./q", f"{Path.cwd()}/q"),
        ("localhost:4444", ("localhost", 4444)),
        ("tcp:h:1", ("h", 1)),
        (":4444", ("127.0.0.1", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("1234", None),
        ("name", None),
        ("a:b", None),
        ("h:0", None),
        ("h:65536", None),
    ],
)
def test_references_that_are_addresses(ref: str, address: object) -> None:
    assert parse_address(ref) == address
