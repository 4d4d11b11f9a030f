"""Runs a program where userfaultfd(2) is refused, as container runtimes do it.

``python -m tests.support.without_userfaultfd PROGRAM ARGUMENTS...``, or as a script. A seccomp
filter answers EPERM for the call, for the program and all that it starts; /dev/userfaultfd is
refused by it as well, by its ioctl. Sources: seccomp(2), Linux ``samples/seccomp``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_NR_OFFSET, _ARGUMENT_1_OFFSET = 0, 24
_SYS_USERFAULTFD, _SYS_IOCTL = 323, 16
_USERFAULTFD_IOC_NEW = 0xAA00


def forbid() -> None:
    """Put the filter on this process.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    program = [
        (_LOAD, 0, 0, _NR_OFFSET),
        (_JUMP_IF_EQUAL, 4, 0, _SYS_USERFAULTFD),
        (_JUMP_IF_EQUAL, 0, 2, _SYS_IOCTL),
        (_LOAD, 0, 0, _ARGUMENT_1_OFFSET),
        (_JUMP_IF_EQUAL, 1, 0, _USERFAULTFD_IOC_NEW),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    content = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(
        struct.pack("@HP", len(program), ctypes.addressof(content))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
