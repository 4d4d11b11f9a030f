"""What storing identical pages of different VMs once would save.

    python -m bench.identical [--ram MIB] [SNAPSHOT SNAPSHOT]

Without files: two Linux guests of the same image, booted separately and used differently. Of the
second one's data pages: how many are in the first one, by pages of 4 KiB, by aligned 64 KiB, and by
frames as the file has them; and how much smaller its file would be without them, as its pages are
compressed (zstd, same level, same frame size). What a table of digests would cost is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from guests.qemu import GuestVm
from stillframe import api
from stillframe.still.frames import FRAME_RAW_TARGET_BYTES, LEVEL_DEFAULT, compress_frame
from stillframe.still.snapshot import Snapshot

_PAGE = 4096
_CHUNK = 65536


def take_two(root: Path, ram_mib: int) -> list[Path]:
    """Take snapshots of two guests: one that has written 64 MiB and little else, and one whose RAM
    was filled and that writes fast."""
    uses: list[dict[str, Any]] = [
        {"mem_mib": 64, "rate_mib_per_s": 20},
        {"mem_mib": 16, "rate_mib_per_s": 60, "populate_mib": ram_mib // 2, "fill": "random"},
    ]
    files = []
    for number, use in enumerate(uses):
        file = root / f"{number}.still"
        with GuestVm("linux", ram_mib=ram_mib, **use).start(timeout_s=300) as vm:
            for _ in range(5):
                vm.wait_tick(60)
            api.take(str(vm.qmp_path), file, level=LEVEL_DEFAULT).wait(300)
        files.append(file)
    return files


def pages(snapshot: Snapshot) -> Iterator[tuple[str, int, bytes]]:
    """Yield the data pages in order, block by block."""
    for block in snapshot.blocks:
        found = [(n, bytes(c)) for n, c in snapshot.iter_pages(block.idstr) if c and any(c)]
        for number, content in sorted(found):
            yield block.idstr, number, content


def digest(content: bytes) -> bytes:
    return blake3(content).digest()


def chunks(snapshot: Snapshot) -> dict[tuple[str, int], bytes]:
    """Return the digests of aligned 64 KiB chunks that are all data, by block and number."""
    found: dict[tuple[str, int], list[bytes]] = {}
    for block, number, content in pages(snapshot):
        found.setdefault((block, number * _PAGE // _CHUNK), []).append(content)
    whole = {place: part for place, part in found.items() if len(part) == _CHUNK // _PAGE}
    return {place: digest(b"".join(part)) for place, part in whole.items()}


def frames(snapshot: Snapshot) -> list[bytes]:
    numbers = range(snapshot.index.frame_count)
    return [digest(raw) for _, raw in snapshot.container.iter_frames(numbers)]


def compressed_bytes(contents: Iterable[bytes]) -> int:
    total, frame = 0, bytearray()
    for content in contents:
        frame += content
        if len(frame) >= FRAME_RAW_TARGET_BYTES:
            total += len(compress_frame(bytes(frame), LEVEL_DEFAULT).data)
            frame.clear()
    return total + (len(compress_frame(bytes(frame), LEVEL_DEFAULT).data) if frame else 0)


def measure(first: Snapshot, second: Snapshot) -> dict[str, Any]:
    known = {digest(content) for *_, content in pages(first)}
    own = [content for *_, content in pages(second)]
    rest = [content for content in own if digest(content) not in known]
    known_chunks, own_chunks = set(chunks(first).values()), chunks(second)
    known_frames, own_frames = set(frames(first)), frames(second)
    all_bytes, rest_bytes = compressed_bytes(own), compressed_bytes(rest)
    shared_chunks = [place for place, one in own_chunks.items() if one in known_chunks]
    shared = set(shared_chunks)
    without = (
        content
        for block, number, content in pages(second)
        if (block, number * _PAGE // _CHUNK) not in shared
    )
    return {
        "data_pages": len(own),
        "identical_pages": len(own) - len(rest),
        "chunks_64k": len(own_chunks),
        "identical_chunks_64k": len(shared_chunks),
        "frames": len(own_frames),
        "identical_frames": sum(one in known_frames for one in own_frames),
        "compressed_mib": round(all_bytes / (1 << 20), 2),
        "saved_by_pages_mib": round((all_bytes - rest_bytes) / (1 << 20), 2),
        "saved_by_pages": round(1 - rest_bytes / all_bytes, 4),
        "saved_by_chunks_64k": round(1 - compressed_bytes(without) / all_bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ram", type=int, default=512, help="MiB")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-identical-", dir="/var/tmp") as place:
        files = options.files or take_two(Path(place), options.ram)
        with api.open(files[0]) as first, api.open(files[1]) as second:
            print(json.dumps({"second in first": measure(first, second)}, indent=1))
            print(json.dumps({"first in second": measure(second, first)}, indent=1))


if __name__ == "__main__":
    main()
