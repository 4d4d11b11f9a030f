"""Record the streams that ``test_streams.py`` reads: ``python -m tests.compat.record_streams``.

It only makes what is missing. To record a stream anew, delete its two files first, look at what
changed in the ``.json``, and say in the commit why; the recordings show what older QEMUs wrote.
The firmware is a few bytes of our own, so that nobody else's code is in the recordings.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from stillframe.vmstate.devices import split_device_state
from stillframe.vmstate.reader import StreamReader
from stillframe.vmstate.records import Configuration, Device, RamBlocks
from tests.support.stream_build import Pipe, replay
from tests.support.stream_summary import run_state
from tests.support.stream_vm import stream_vm

STREAMS = Path(__file__).parent / "streams"
BASE = ["-m", "64", "-nodefaults"]
FIRMWARE = (
    bytes(0xFF00)
    # for (ax = 0x1000; ax < 0x2000; ax += 0x100) { ds = ax; ds:[0] = ds:[0xff0] = ax; } halt
    + bytes.fromhex("b80010 8ed8 a30000 a3f00f 050001 3d0020 72f0 fa f4 ebfd").ljust(0xF0, b"\0")
    + bytes.fromhex("e90dff").ljust(16, b"\0")
)
"""64 KiB for ``-bios``: starts at its last 16 bytes, and leaves a word in each of 16 pages."""

RECORDINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "q35-precopy": (["-M", "q35", *BASE], ()),
    "pc-background": (["-M", "pc", *BASE, "-smp", "2", "-device", "virtio-rng-pci"],
                      ("background-snapshot",)),
    "q35-compress": (["-M", "q35", *BASE], ("compress",)),
    "q35-devices": (["-M", "q35", *BASE, "-device", "virtio-net-pci"], ("device-state",)),
}  # fmt: skip


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expectation(stream: bytes) -> dict[str, Any]:
    """What the reader finds in the stream, in a form that can be read and compared."""
    events = list(StreamReader(Pipe(stream)).events())
    sections = [e.section for e in events if isinstance(e, Device)]
    return {
        "stream_sha256": digest(stream),
        "stream_bytes": len(stream),
        "machine": next((e.name for e in events if isinstance(e, Configuration)), None),
        "run_state": run_state(sections),
        "blocks": [
            f"{b.idstr}: {b.used_length_bytes}"
            for e in events if isinstance(e, RamBlocks) for b in e.blocks
        ],
        "ram_sha256": {n: digest(r) for n, r in replay(events).items()},
        "sections": [
            f"{s.section_id} {s.idstr} {s.instance_id} v{s.version_id}: "
            f"{len(s.payload)} bytes, sha256 {digest(s.raw)}"
            for s in sections
        ],
    }  # fmt: skip


def load(name: str) -> bytes:
    return zstd.decompress((STREAMS / f"{name}.zst").read_bytes())


def record(name: str) -> None:
    arguments, capabilities = RECORDINGS[name]
    with tempfile.TemporaryDirectory() as directory:
        firmware = Path(directory) / "firmware"
        firmware.write_bytes(FIRMWARE)
        with stream_vm([*arguments, "-bios", str(firmware)], Path(directory)) as vm:
            time.sleep(1)
            if capabilities == ("device-state",):
                vm.qmp("stop")
                stream = vm.device_state()
                split_device_state(stream)
            else:
                vm.capability(*capabilities)
                stream = vm.migrate()
            version = vm.qmp("query-version")
    STREAMS.mkdir(exist_ok=True)
    (STREAMS / f"{name}.zst").write_bytes(zstd.compress(stream, 19))
    known = {"qemu": version["package"] or version["qemu"], "arguments": arguments}
    text = json.dumps(known | expectation(stream), indent=1)
    (STREAMS / f"{name}.json").write_text(text + "\n")


def main() -> None:
    for name in RECORDINGS:
        path = STREAMS / f"{name}.zst"
        if path.exists():
            sys.stdout.write(f"{name}: kept\n")
        else:
            record(name)
            sys.stdout.write(f"{name}: recorded, {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
