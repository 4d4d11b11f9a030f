"""A board with a ledger in a process of its own, for snapshots that are taken from outside.

``python -m tests.support.ledger_board CONFIG QMP_PATH DISK_COPY``, the configuration in JSON. The
guest waits for ``cont``. Ends with its standard input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration.host import start_host
from tests.support.ledger_source import keep_disk_of_stop


def main() -> None:
    words, qmp_path, copy = sys.argv[1:]
    config = msgspec.json.decode(words, type=BoardConfig)
    with start_host(config, qmp=qmp_path, paused=True) as host:
        keep_disk_of_stop(host.board, Path(copy))
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
