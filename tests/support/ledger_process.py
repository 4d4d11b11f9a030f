"""A board of a process of its own that waits for a migration; for tests that kill it.

Prints ``listening``, then what became of the load; ends with its standard input.
"""

from __future__ import annotations

import sys

from stillframe.errors import StillframeError
from stillframe.machine.board.config import BoardConfig
from stillframe.machine.board.guests import guest_path
from stillframe.migration.host import start_host


def main() -> None:
    uri, ram_bytes, vcpus, options = sys.argv[1:]
    config = BoardConfig(
        guest_path=str(guest_path("ledger")),
        command_line=options,
        ram_bytes=int(ram_bytes),
        vcpus=int(vcpus),
        display_width=64,
        display_height=64,
    )
    with start_host(config, incoming="defer") as host:
        host.migration.set_capabilities({"postcopy-ram": True})
        host.migration.incoming(uri)
        print("listening", flush=True)
        try:
            host.migration.wait()
            print(host.board.run_state, flush=True)
        except StillframeError as error:
            print(f"failed: {error}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
