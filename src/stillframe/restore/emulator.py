"""The process that a restore starts: a QEMU, or a VMM of a wing."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from stillframe.errors import HostError, MachineError
from stillframe.restore.records import RestorePlan
from stillframe.restore.remedies import remedy_for
from stillframe.restore.run_as import identity
from stillframe.restore.show import printable
from stillframe.vmstate.wire import STREAM_START

_KILL_TIMEOUT_S = 10.0
_LOG_TAIL_BYTES = 16 << 10
_SHOWN_LINES = 4
_SPEAKER = re.compile(r"^(?:\S*qemu\S*|stillframe): ")
_NO_ERROR = re.compile(r"warning:|board .* \(process \d+\), QMP at ")


class Emulator:
    """One started VMM that reads its stream from a pipe, in a session of its own.

    If this process dies, the pipe ends, and a VMM without its whole stream exits. For that it gets
    the first bytes at once: QEMU waits for data alone, and would not notice the end of an empty
    pipe (``io/channel-watch.c``; it would poll for ever).

    ``sent_bytes``: what it has of its stream by its start.
    """

    sent_bytes = len(STREAM_START)

    def __init__(self, plan: RestorePlan, *, inherits: Sequence[int] = ()) -> None:
        """Start the VMM.

        Args:
            inherits: descriptors that it gets under the same numbers.

        Raises:
            HostError: it cannot be started.
        """
        self._log_path = Path(plan.log_path)
        self._plan = plan
        self.vmm_name = plan.vmm_name
        self.qmp_address = plan.qmp_address
        self.began_s = time.monotonic()
        read_end, self.stream_fd = os.pipe()
        os.write(self.stream_fd, STREAM_START)
        try:
            with open(plan.log_path, "ab", opener=_private) as log:
                self._process = subprocess.Popen(
                    plan.argv_with_stream(read_end),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=plan.cwd,
                    env=os.environ | plan.environment,
                    pass_fds=(read_end, *inherits),
                    start_new_session=True,
                    **identity(plan.run_as),
                )
        except (OSError, ValueError) as error:
            os.close(self.stream_fd)
            raise HostError(f"cannot start {plan.program}", why=str(error)) from error
        finally:
            os.close(read_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_end(self, timeout_s: float) -> bool:
        """Return whether it ends within that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.has_ended()

    def failure(self, doing: str, why: str | None = None) -> MachineError:
        """Return the error for its end or failure: its own words, and a remedy for them.

        Args:
            why: what it said over its monitor.
        """
        code = self._process.poll()
        what = f"{self.vmm_name} failed while {doing}"
        if code is not None:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            what = f"{self.vmm_name} ended {how} while {doing}"
        words = self.last_words()
        if why and why not in words:
            words = " / ".join(filter(None, (why, words)))
        return MachineError(
            what, why=words or None, remedy=remedy_for(words, self._plan), guest_state="none"
        )

    def last_words(self) -> str:
        """Return the last lines of its log, on one line."""
        try:
            with self._log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [_SPEAKER.sub("", line) for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if not _NO_ERROR.match(line)]
        shown = errors or lines
        if len(shown) > _SHOWN_LINES:  # the first one often is the cause of the others
            shown = [shown[0], "...", *shown[1 - _SHOWN_LINES :]]
        return printable(" / ".join(shown))

    def close_stream(self) -> None:
        """End the stream; a second call does nothing."""
        if self.stream_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.stream_fd)
            self.stream_fd = -1

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self.close_stream()
        if not self.has_ended():
            os.killpg(self.pid, signal.SIGKILL)  # the process may be a wrapper of the VMM
            self.wait_end(_KILL_TIMEOUT_S)

    def let_go(self) -> None:
        """Leave it running; a thread reaps it, so that no zombie stays while this process lives."""
        self.close_stream()
        threading.Thread(target=self._reap, name=f"reaper of {self.pid}", daemon=True).start()

    def _reap(self) -> None:
        # Not by waitpid(2) alone: that would also take the stops of a VM to which another thread of
        # ours has attached (ptrace(2)), and that thread would wait in vain.
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()  # takes descriptors of any number
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        finally:
            os.close(pidfd)
        self._process.wait()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
