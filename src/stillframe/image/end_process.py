"""The process of ``end_together``: a plain script that imports only the standard library, so that
it starts in milliseconds::

    end_process.py PIPE READY PIDFD...

A byte on the pipe: the VMs live on. End of file without one, which the kernel delivers however the
writer died: it kills the VMs.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe, ready, *pidfds = map(int, sys.argv[1:])
    os.write(ready, b"R")
    os.close(ready)
    if os.read(pipe, 1):
        return
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


if __name__ == "__main__":
    main()
