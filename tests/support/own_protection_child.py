"""Which protection a process of some user gets, and whether a capture with it is right.

Run as ``python -m tests.support.own_protection_child PREFER [nobody] [no-userfaultfd]``; prints
the kind that it got and "whole" or "torn", or the error. PREFER may be missing-pages: a probe.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from stillframe.board.memory.guest_ram import GuestRam
from stillframe.board.memory.missing_pages import MissingPages
from stillframe.board.memory.own_protection import open_own_protection
from stillframe.errors import StillframeError
from tests.support.own_writer import OwnWriter, native, take_own

MIB = 1 << 20
PAGE = 4096
_NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_FILTER_MODE = 2
_LOAD_NUMBER, _EQUAL, _RETURN = (0x20, 0, 0, 0), 0x15, 0x06
_ALLOW, _EPERM, _USERFAULTFD = 0x7FFF0000, 0x00050001, 323


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    # As after an exec: /proc/self is ours.
    assert ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0) == 0


def _forbid_userfaultfd() -> None:
    """As container runtimes do it: the system call fails with EPERM."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            _LOAD_NUMBER,
            (_EQUAL, 0, 1, _USERFAULTFD),
            (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program)
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, header, 0, 0) == 0


def _main() -> None:
    prefer, *how = sys.argv[1:]
    native()  # compiled as who we are now
    if "nobody" in how:
        _become_nobody()
    if "no-userfaultfd" in how:
        _forbid_userfaultfd()
    if prefer == "missing-pages":
        try:
            MissingPages.probe()
            print("probed")
        except StillframeError as error:
            print(f"{error.kind}: {error}")
        return
    ram = GuestRam("ram", 4 * MIB)
    file = os.memfd_create("disk")
    os.write(file, b"x" * PAGE)
    try:
        protection = open_own_protection(prefer)  # type: ignore[arg-type]
    except StillframeError as error:
        print(f"{error.kind}: {error}")
        return
    kind = protection.kind
    protection.close()
    with OwnWriter(ram) as writer:
        for _ in range(5):
            (captured,) = take_own(lambda: open_own_protection(prefer), [writer])
            if captured.repeated or captured.is_torn(writer.written_bytes, PAGE):
                print(kind, "torn")
                return
            assert ram.read_from(file, 3 * MIB, PAGE, 0) == PAGE
    print(kind, "whole")


if __name__ == "__main__":
    _main()
