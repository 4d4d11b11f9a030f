"""Boot a Linux guest, snapshot it while it writes, restore the snapshot beside it.

Run by ``make demo-qemu``. Everything goes through the command line tool, as a user would do it;
what it runs is printed. All that it starts is ended, and all that it writes is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from guests.qemu import GuestVm
from guests.serial import SerialConsole
from stillframe.errors import StillframeError

RAM_MIB = 512
WRITE_MIB = 64
POPULATE_MIB = 128
RATE_MIB_PER_S = 20
SHOW_TICKS = 3
COMMAND_TIMEOUT_S = 120


def main() -> int:
    try:
        with tempfile.TemporaryDirectory(prefix="stillframe-demo-") as place:
            return run(Path(place))
    except StillframeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(place: Path) -> int:
    file = place / "demo.still"
    say(f"1. Booting Linux in a stock QEMU: {RAM_MIB} MiB of RAM, writing {RATE_MIB_PER_S} MiB/s")
    with GuestVm(
        ram_mib=RAM_MIB,
        mem_mib=WRITE_MIB,
        populate_mib=POPULATE_MIB,
        fill="text",
        rate_mib_per_s=RATE_MIB_PER_S,
        name="demo",
        memory="private",
        tick_ms=500,
    ) as vm:
        show_ticks("guest", vm.console, SHOW_TICKS)

        say("2. Taking a snapshot while it runs")
        taken = stillframe("take", "demo", "-o", str(file))
        parts = ", ".join(
            f"{name.removesuffix('_ms')} {value:.1f}" for name, value in taken["downtime"].items()
        )
        print(f"   downtime           {taken['downtime_ms']:.1f} ms ({parts})")
        print(
            f"   RAM                {mib(taken['ram_bytes'])}, saved in {taken['total_ms']:.0f} ms"
        )
        print(f"   file               {mib(taken['file_bytes'])}")
        print(
            f"   pages saved first  {taken['pages']['faulted']} in {taken['faults']} faults, "
            f"median {taken['fault_p50_us']:.0f} us"
        )
        print(f"   id                 {taken['id'][:16]}")

        say("3. The guest went on all the while")
        show_ticks("guest", vm.console, SHOW_TICKS)

        say("4. Starting the snapshot as a second VM")
        restored = stillframe("restore", str(file))
        try:
            console = SerialConsole(serial_of(restored["argv"]))
            try:
                say("5. Both run: the second one went on from the instant of the snapshot")
                show_ticks("guest   ", vm.console, SHOW_TICKS)
                show_ticks("restored", console, SHOW_TICKS)
                say("6. Each checks all of its memory")
                audits = [vm.command("audit"), console.command("audit")]
                print(f"   guest     {audits[0]}\n   restored  {audits[1]}")
            finally:
                console.close()
        finally:
            end(restored)
    good = all(audit.startswith("audit ok") for audit in audits)
    say("Done: both are whole." if good else "FAILED: an audit found damage.")
    return 0 if good else 1


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def mib(length_bytes: int) -> str:
    return f"{length_bytes / (1 << 20):.0f} MiB"


def show_ticks(name: str, console: SerialConsole, count: int) -> None:
    for _ in range(count):
        tick = console.wait_tick()
        print(
            f"   {name}  tick {tick.n}, pass {tick.passes}, {tick.pages} pages written", flush=True
        )


def stillframe(*arguments: str) -> dict[str, Any]:
    """Run the tool; its progress is shown, its JSON returned."""
    print(f"   $ stillframe {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "stillframe", *arguments, "--json"],
        stdout=subprocess.PIPE,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    reply: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    if done.returncode:
        raise SystemExit(f"demo: stillframe {arguments[0]} failed: {reply.get('what')}")
    return reply


def serial_of(argv: list[str]) -> Path:
    """The serial line's socket in a QEMU command line."""
    for argument in argv:
        if "id=serial0" in argument:
            for option in argument.split(","):
                if option.startswith("path="):
                    return Path(option.removeprefix("path="))
    raise SystemExit("demo: the restored VM has no serial line")


def end(restored: dict[str, Any]) -> None:
    """Kill the restored VM by its pid, and remove its directory."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(restored["pid"], signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{restored['pid']}").exists():
            break
        time.sleep(0.02)
    for key in ("directory", "disk_directory"):
        if restored.get(key):
            shutil.rmtree(restored[key], ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
