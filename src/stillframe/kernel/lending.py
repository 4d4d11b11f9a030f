"""Lending a descriptor of ours to another process, whatever its user and namespaces.

The process makes a socket pair, we fetch one end (pidfd_getfd(2)) and send the descriptor through
it, and the process receives it at the other end (unix(7), SCM_RIGHTS). Only the descriptor stays in
the process.
"""

from __future__ import annotations

import os
import socket
import struct

from stillframe.errors import HostError
from stillframe.kernel import arch_x86_64 as arch
from stillframe.kernel.injection import RemoteSyscalls
from stillframe.kernel.remote_attach import fetch_fd

_PAIR_TYPE = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
_RECEIVE = socket.MSG_DONTWAIT | 0x40000000  # MSG_CMSG_CLOEXEC
_MESSAGE = struct.Struct("=QQQQQQQ")  # struct msghdr
_VECTOR = struct.Struct("=QQ")  # struct iovec
_ENDS = struct.Struct("=ii")
_CONTROL = struct.Struct("=QiiiI")  # struct cmsghdr with one descriptor, padded
_VECTOR_AT, _DATA_AT, _CONTROL_AT = 64, 96, 128


def lend(remote: RemoteSyscalls, pidfd: int, fd: int) -> int:
    """Lend ``fd`` to the process; return its number there.

    Args:
        remote: attached to the process. pidfd: of the process.

    Raises:
        RefusedError: a seccomp filter forbids it. HostError: the process cannot receive it.
    """
    remote.refuse_unless_allowed(
        {
            "socketpair": (arch.SYS_SOCKETPAIR, (socket.AF_UNIX, _PAIR_TYPE, 0)),
            "recvmsg": (arch.SYS_RECVMSG, ()),
        }
    )
    room = remote.room
    made = remote.call(arch.SYS_SOCKETPAIR, socket.AF_UNIX, _PAIR_TYPE, 0, room)
    if made < 0:
        raise _failure(-made)
    ends = _read(remote, room, _ENDS)
    try:
        with socket.socket(fileno=fetch_fd(pidfd, ends[0])) as ours:
            socket.send_fds(ours, [b"1"], [fd])
        remote.write(room + _VECTOR_AT, _VECTOR.pack(room + _DATA_AT, 1))
        control = room + _CONTROL_AT, _CONTROL.size
        remote.write(room, _MESSAGE.pack(0, 0, room + _VECTOR_AT, 1, *control, 0))
        got = remote.call(arch.SYS_RECVMSG, ends[1], room, _RECEIVE)
        if got < 0:
            raise _failure(-got)
        _, level, kind, number, _ = _read(remote, control[0], _CONTROL)
        if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            raise HostError("the VM got no descriptor", guest_state="unknown")
        return int(number)
    finally:
        for end in ends:
            remote.call(arch.SYS_CLOSE, end)


def _read(remote: RemoteSyscalls, address: int, layout: struct.Struct) -> tuple[int, ...]:
    content = remote.read(address, layout.size)
    if len(content) != layout.size:
        raise HostError("the VM's memory cannot be read", guest_state="unknown")
    return layout.unpack(content)


def _failure(number: int) -> HostError:
    return HostError("the VM cannot be given a descriptor", why=os.strerror(number))
