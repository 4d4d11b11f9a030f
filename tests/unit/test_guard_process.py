"""The guard goes on asking while the VM may not go on yet."""

from __future__ import annotations

import socket
import threading

import pytest

from stillframe.snapshot import guard_process


def test_a_refused_cont_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU refuses it while a dump runs; the answer comes in pieces, with events between."""
    monkeypatch.setattr(guard_process, "REFUSED_PAUSE_S", 0.01)
    ours, theirs = socket.socketpair()
    guard = threading.Thread(target=guard_process.resume, args=(ours,), daemon=True)
    guard.start()
    asked = 0
    with ours, theirs:
        theirs.settimeout(60)
        for answer in (b'"error": {"class": "GenericError"', b'"error": {', b'"return": {'):
            assert b'"cont"' in theirs.recv(4096)
            asked += 1
            theirs.sendall(b'{"event": "STOP"}\n{"id": "stillframe-guard", ')
            theirs.sendall(answer + b"}}\n")
        guard.join(60)
        assert not guard.is_alive()
    assert asked == 3
