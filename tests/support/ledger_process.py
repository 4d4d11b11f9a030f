"""A board of a process of its own, to or from which one migrates; for tests that kill it.

As a destination it prints ``listening``, as a source ``ready``; then what became of the
migration. It ends with its standard input.
"""

from __future__ import annotations

import sys

from stillframe.board.guests import guest_path
from stillframe.board.hardware.config import BoardConfig
from stillframe.board.migration.host import start_host
from stillframe.errors import StillframeError


def main() -> None:
    role, uri, serial, ram_bytes, vcpus, options = sys.argv[1:]
    config = BoardConfig(
        guest_path=str(guest_path("ledger")),
        command_line=options,
        ram_bytes=int(ram_bytes),
        vcpus=int(vcpus),
        serial=f"unix:{serial}",
        display_width=64,
        display_height=64,
    )
    with start_host(config, incoming="defer" if role == "destination" else None) as host:
        if role == "destination":
            host.migration.set_capabilities({"postcopy-ram": True})
            host.migration.incoming(uri)
            print("listening", flush=True)
        else:
            print("ready", flush=True)
            sys.stdin.readline()
            host.migration.migrate(uri)
        try:
            host.migration.wait()
            print(host.board.run_state, flush=True)
        except StillframeError as error:
            print(f"failed: {error}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
