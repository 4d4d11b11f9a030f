"""Makes ``docs/images/terminal.svg``: what the README's commands print, on a real Linux guest.

Run it with the environment of the tests, as root, after a change of what commands show::

    python tools/terminal_picture.py
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guests.qemu import GuestVm  # noqa: E402 - needs the path

PICTURE = ROOT / "docs" / "images" / "terminal.svg"
COLUMNS = 112
SESSION = (
    ("ps",),
    ("take", "web1", "-o", "web1.still", "-q"),
    ("verify", "web1.still", "-q"),
    ("restore", "web1.still", "--wait", "-q"),
    ("fork", "web1.still", "-n", "2", "-q"),
)


def main() -> int:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as place, GuestVm(name="web1", ram_mib=512) as vm:
        vm.wait_tick()
        for words in SESSION:
            shown = [word for word in words if word != "-q"]
            console.print(Text("$ stillframe " + " ".join(shown), style="bold"))
            done = subprocess.run(
                [sys.executable, "-m", "stillframe", *words],
                cwd=place,
                capture_output=True,
                text=True,
                check=True,
            )
            text = done.stdout.replace(str(vm.directory), "/run/web1").replace(place, "/snapshots")
            console.print(Text(text), no_wrap=True, crop=True)
        end_restored(place)
    PICTURE.parent.mkdir(exist_ok=True)
    # Without the fonts that it would load from elsewhere.
    picture = console.export_svg(title="stillframe")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S))
    return 0


def end_restored(place: str) -> None:
    """End the VMs that were restored from the snapshot in ``place``."""
    listed = subprocess.run(
        [sys.executable, "-m", "stillframe", "ps", "--json"],
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    for vm in json.loads(listed.stdout):
        if (vm["restored_from"] or "").startswith(place):
            subprocess.run([sys.executable, "-m", "stillframe", "kill", str(vm["pid"])], check=True)


if __name__ == "__main__":
    sys.exit(main())
