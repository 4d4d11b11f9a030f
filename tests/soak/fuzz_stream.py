"""Mutational fuzzing of the stream reader: ``python -m tests.soak.fuzz_stream --seconds 60``.

Recorded streams of real QEMUs and built ones are damaged (bits, cuts, splices, absurd lengths) and
read. Only DataError may come out; memory (RLIMIT_AS) and time of each case are bounded; what is
accepted must account for every byte; a pipe and a file must give the same. The first case that
breaks a rule is saved, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import io
import random
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import pack
from types import FrameType

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.devices import (
    GLOBAL_STATE_IDSTR,
    describe,
    find_section,
    split_device_state,
)
from stillframe.vmstate.x86_cpu import parse_x86_cpu
from tests.compat.record_streams import RECORDINGS, load
from tests.support import stream_build as sb
from tests.support.stream_summary import run_state, verify_stream
from tests.unit.vmstate.test_mapped_ram import mapped_file

MEMORY_LIMIT_BYTES = 1 << 30
CASE_LIMIT_S = 5
ABSURD = tuple(
    pack(form, number)
    for form, bits in ((">B", 8), (">H", 16), (">I", 32), (">Q", 64))
    for number in (0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1)
) + tuple(
    pack(">Q", 0x1000 << shift | flags) for shift in (0, 20, 40) for flags in range(0, 1024, 33)
)


class TooSlowError(Exception):
    """A case took more processor time than its limit."""


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlowError


def small_streams() -> list[bytes]:
    """Streams of every kind, small enough for thousands of cases per second."""
    devices = split_device_state(load("q35-devices"))
    early_payload = pack(">QQQIQ", 0, 1 << 30, 1 << 21, 0, 0) + bytes(64)
    early = sb.device(70, "0000:00:04.0/virtio-mem-device-early", early_payload)
    page = bytes(range(256)) * 16
    packed = zlib.compress(page)
    delta = b"\x02\x03xyz\x85\x01\x02ab"
    blocks = (("pc.ram", 40 * sb.PAGE), ("rom", sb.PAGE))
    records = (
        writer.ram_page_record(0, page, block="pc.ram")
        + writer.ram_page_record(sb.PAGE, page, block=None)
        + b"".join(writer.ram_zero_record(i * sb.PAGE, block=None) for i in range(2, 40))
        + writer.ram_zero_record(0, block="rom")
        + sb.word(0, 0x120) + pack(">I", len(packed)) + packed
        + sb.word(0, 0x40) + sb.name("pc.ram") + b"\1" + pack(">H", len(delta)) + delta
    )  # fmt: skip
    start = writer.ram_start_section(blocks, section_id=2)
    advised = b"\x08\0\1\0\0" + b"\x08\0\2\0\4\0\0\0\1" + b"\x08\0\3\0\x10" + bytes(16)
    return [
        sb.head() + start + early.raw + sb.part(records) + sb.part(b"", kind=3) + sb.tail(devices),
        sb.head(None) + start + sb.part(records) + sb.tail(devices[:9], described=False),
        sb.configuration(
            "virt-8.2",
            sb.subsection("target-page-bits", pack(">I", 12)),
            sb.capabilities("x-ignore-shared"),
            sb.subsection("uuid", bytes(16)),
        )
        + sb.start(
            sb.word(3 * sb.PAGE, 4)
            + sb.name("a") + pack(">QQ", sb.PAGE, 0xFD000000)
            + sb.name("b") + pack(">QQ", 2 * sb.PAGE, 0) + sb.word(0, 0x10)
        )
        + sb.tail(devices[-3:]),
        sb.head()
        + advised
        + sb.start(
            sb.word(3 * sb.PAGE, 4)
            + sb.name("a") + pack(">Q", sb.PAGE)
            + sb.name("b") + pack(">QQ", 2 * sb.PAGE, 2 << 20) + sb.word(0, 0x10)
        )
        + sb.tail(devices[-3:]),
        mapped_file({"m": {0: page, 3: page, 70: page}}, {"m": 80}),
    ]  # fmt: skip


def mutate(chooser: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Damage a stream in one to five ways; most of it where the structure is."""
    out = bytearray(data)
    for _ in range(chooser.choice((1, 1, 1, 2, 3, 5))):
        place = _place(chooser, len(out))
        match chooser.randrange(9):
            case 0 | 1:
                if place < len(out):
                    out[place] ^= 1 << chooser.randrange(8)
            case 2 | 3:
                piece = chooser.choice(ABSURD)
                out[place : place + len(piece)] = piece
            case 4:
                del out[place:]
            case 5:
                del out[place : place + chooser.choice((1, 4, 8, 100, 5000))]
            case 6:
                out[place:place] = chooser.randbytes(chooser.choice((1, 4, 8, 100)))
            case 7:
                other = chooser.choice(others)
                cut = _place(chooser, len(other))
                out[place:] = other[cut:]
            case _:
                begin = _place(chooser, len(out))
                out[place:place] = out[begin : begin + chooser.choice((5, 30, 500))]
    return bytes(out)


def _place(chooser: random.Random, size: int) -> int:
    near = chooser.choice((200, 5000, size, size))
    place = chooser.randrange(min(near, size) + 1)
    return place if chooser.random() < 0.5 else size - place


def read_stream(chooser: random.Random, data: bytes) -> str:
    """Read as a file and, now and then, as a pipe; both must agree."""
    lookup = (lambda _index, _offset: bytes(sb.PAGE)) if chooser.random() < 0.7 else None
    limit = chooser.choice((1 << 26, 1 << 17))

    def outcome(source: io.IOBase) -> object:
        try:
            return verify_stream(source, page_lookup=lookup, device_limit_bytes=limit)
        except DataError as error:
            if error.offset_bytes is None:
                raise ValueError("a DataError without its offset") from error
            return error.what

    result = outcome(io.BytesIO(data))
    if chooser.random() < 0.1 and b"mapped-ram" not in data[:200]:
        piped = outcome(sb.Pipe(data, chooser.choice((1 << 20, 4099, 100))))
        if piped != result:
            raise ValueError(f"a pipe gives {piped}, a file {result}")
    if isinstance(result, str):
        return result
    if result.stream_bytes != len(data):  # type: ignore[attr-defined]
        raise ValueError("accepted, but not to its end")
    return "accepted"


def split_state(_chooser: random.Random, data: bytes) -> str:
    """Cut a device state; what is cut must be the data again."""
    try:
        sections = split_device_state(data)
    except DataError as error:
        return error.what
    if writer.stream_header() + b"".join(s.raw for s in sections) + b"\0" != data:
        raise ValueError("the sections are not the data")
    for section in sections:
        try:
            parse_x86_cpu(section.payload, section.version_id)
            if find_section(sections, GLOBAL_STATE_IDSTR) is not None:
                run_state(sections)
        except DataError:
            pass
    describe(sections, target_page_bytes=4096)
    return "accepted"


def run(seconds: float, seed: int, keep: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGPROF, _too_slow)
    chooser = random.Random(seed)
    small = small_streams()
    recorded = [load(name) for name in RECORDINGS if name != "q35-devices"]
    state = [load("q35-devices")]
    everything = [*small, *recorded, *state]
    kinds: tuple[tuple[int, Sequence[bytes], Callable[[random.Random, bytes], str]], ...] = (
        (6, small, read_stream),
        (1, recorded, read_stream),
        (3, state, split_state),
    )
    weights = [weight for weight, _, _ in kinds]
    for data in (*small, *recorded):  # the undamaged ones must be accepted, or the run says nothing
        verify_stream(io.BytesIO(data), page_lookup=lambda _index, _offset: bytes(sb.PAGE))
    outcomes: collections.Counter[str] = collections.Counter()
    slowest_s = 0.0
    cases = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _, seeds, action = chooser.choices(kinds, weights)[0]
        data = mutate(chooser, chooser.choice(seeds), everything)
        began_s = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CASE_LIMIT_S)
        try:
            outcome = action(chooser, data)
        except BaseException as error:  # noqa: BLE001 - anything else is what is looked for
            signal.setitimer(signal.ITIMER_PROF, 0)
            path = keep / f"fuzz-stream-{seed}-{cases}.bin"
            path.write_bytes(data)
            print(f"case {cases} of seed {seed}: {error!r} in {action.__name__}, saved as {path}")
            return 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest_s = max(slowest_s, time.process_time() - began_s)
        outcomes["".join(c for c in outcome if not c.isdigit())[:60]] += 1
        cases += 1
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{cases} cases in {seconds:.0f} s, seed {seed}: no rule broken")
    print(f"slowest case {slowest_s * 1000:.0f} ms of processor time, peak memory {peak_mib} MiB")
    for what, count in outcomes.most_common(25):
        print(f"{count:9} {what}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="where to save a bad case")
    arguments = parser.parse_args()
    return run(arguments.seconds, arguments.seed, arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
