"""The process that a restore starts: a QEMU or a board."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
from pathlib import Path

from stillframe.errors import HostError, MachineError
from stillframe.restore.records import RestorePlan
from stillframe.restore.show import printable

_KILL_TIMEOUT_S = 10.0
_LOG_TAIL_BYTES = 16 << 10
_SHOWN_LINES = 4
_SPEAKER = re.compile(r"^(?:\S*qemu\S*|stillframe): ")
_NO_ERROR = re.compile(r"warning:|board .* \(process \d+\), QMP at ")


class Emulator:
    """One started VMM that reads its stream from a pipe. It is in a session of its own.

    If this process dies, the pipe ends, and a VMM that has not got its whole stream exits.
    """

    def __init__(self, plan: RestorePlan, *, owns: int | None = None) -> None:
        """Start it.

        Args:
            owns: a descriptor that it holds as long as it lives.

        Raises:
            HostError: it cannot be started.
        """
        self._log_path = Path(plan.log_path)
        self.vmm_name = plan.vmm_name
        read_end, self.stream_fd = os.pipe()
        try:
            with open(plan.log_path, "ab", opener=_private) as log:
                self._process = subprocess.Popen(
                    plan.argv_with_stream(read_end),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=plan.cwd,
                    env=_own_environment() if plan.vmm == "board" else None,
                    pass_fds=(read_end,) if owns is None else (read_end, owns),
                    start_new_session=True,
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
        """Whether it ends within that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.has_ended()

    def failure(self, doing: str, why: str | None = None) -> MachineError:
        """What to say when it ended or failed: its own words.

        Args:
            why: what it said over its monitor.
        """
        code = self._process.poll()
        what = f"{self.vmm_name} failed while {doing}"
        if code is not None:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            what = f"{self.vmm_name} ended {how} while {doing}"
        return MachineError(what, why=why or self.last_words() or None, guest_state="none")

    def last_words(self) -> str:
        """The last lines of its log, on one line."""
        try:
            with self._log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [_SPEAKER.sub("", line) for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if not _NO_ERROR.match(line)]
        return printable(" / ".join((errors or lines)[-_SHOWN_LINES:]))

    def close_stream(self) -> None:
        """End the stream; does nothing the second time."""
        if self.stream_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.stream_fd)
            self.stream_fd = -1

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        self.close_stream()
        if not self.has_ended():
            self._process.send_signal(signal.SIGKILL)
            self.wait_end(_KILL_TIMEOUT_S)

    def let_go(self) -> None:
        """Leave it running; its end is awaited, so that no zombie stays while we live."""
        self.close_stream()
        threading.Thread(target=self._reap, name=f"reaper of {self.pid}", daemon=True).start()

    def _reap(self) -> None:
        # Not by waitpid(2) alone: it would also take the stops of a VM that another thread of ours
        # has attached to (ptrace(2)), which then waits in vain.
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()  # takes descriptors of any number
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        finally:
            os.close(pidfd)
        self._process.wait()


def _own_environment() -> dict[str, str]:
    """In which ``python -m stillframe`` is this very Stillframe, whatever the directory."""
    own = str(Path(__file__).parents[2])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [own, *(str(Path(path).absolute()) for path in given if path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
