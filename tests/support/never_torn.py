"""Snapshots of ledgers at random moments: each is checked, restored, and audited by its guest."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stillframe.board.migration.host import start_host
from stillframe.errors import MachineError
from tests.support.ledger_check import check_ledger
from tests.support.ledger_source import (
    TIMEOUT_S,
    LedgerKind,
    LedgerSource,
    audit_over,
    ledger_config,
    serial_line,
)

_LONGEST_WAIT_S = 0.1
_AUDIT_S = 60.0
_TICK_S = 1.0


class Counted(msgspec.Struct):
    """What came of it.

    ``busy_vcpus``: how many vCPUs were inside an operation, in all snapshots together.
    ``torn``: what is wrong, with the number of the snapshot.
    """

    snapshots: int = 0
    busy_vcpus: int = 0
    faults: int = 0
    torn: list[tuple[int, str]] = []

    def __str__(self) -> str:
        text = (
            f"{self.snapshots} snapshots, {len(self.torn)} torn, {self.faults} faults,"
            f" {self.busy_vcpus} vCPUs inside a transfer"
        )
        return "; ".join([text, *(f"{number}: {why}" for number, why in self.torn[:5])])


def count_torn(source: LedgerSource, directory: Path, count: int, *, seed: int) -> Counted:
    """Take snapshots at random moments. The source waits while each is checked and restored.

    Args:
        directory: for the files; they are removed.
    """
    chance = random.Random(seed)
    counted = Counted()
    for number in range(count):
        time.sleep(chance.uniform(0, _LONGEST_WAIT_S))
        file = directory / "snapshot"
        counted.faults += source.snapshot(file)["faults"]
        # A pause stops the board once more.
        disk = source.disk_at_stop.rename(directory / "disk-of-instant")
        source.pause()
        try:
            _check(source, file, disk, number, counted)
        finally:
            source.go_on()
        file.unlink()
        disk.unlink()
        counted.snapshots += 1
    return counted


def _check(source: LedgerSource, file: Path, disk: Path, number: int, counted: Counted) -> None:
    image = source.ram(file)
    report = check_ledger(image)
    counted.busy_vcpus += report.busy_vcpus
    if not report.consistent:
        counted.torn.append((number, str(report)))
    audit = restored_audit(source.kind, file, disk, image)
    if not audit.startswith("AUDIT ok"):
        counted.torn.append((number, audit))


def restored_audit(kind: LedgerKind, file: Path, disk: Path, image: bytes | bytearray) -> str:
    """What the guest says of itself on a second board that starts from the snapshot."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stillframe-again-")))
        again = stack.enter_context(
            start_host(ledger_config(kind, place, disk), incoming=f"file:{file}", paused=True)
        )
        assert again.migration.wait(TIMEOUT_S), "it is not loaded"
        ram = again.board.rams[0]
        if ram.read(0, ram.length_bytes) != image:
            return "the RAM that was loaded is not that of the file"
        console = serial_line(stack, place)
        again.board.cont()
        # It works on for some time first: it reads back from the disk what it wrote before.
        with contextlib.suppress(MachineError):
            console.wait_line("^tick ", timeout_s=_TICK_S)
        # One that is torn may panic, or wait for ever.
        return audit_over(console, lambda: again.board.run_state == "running", timeout_s=_AUDIT_S)


def assert_sound(source: LedgerSource) -> None:
    """The guest answers, and says that all of its RAM is of one instant."""
    audit = source.audit()
    assert audit.startswith("AUDIT ok"), audit


def cancel_at_random_moments(
    source: LedgerSource, directory: Path, count: int, *, seed: int
) -> int:
    """Cancel so many snapshots at random moments of their run: each leaves nothing, and the guest
    sound.

    Returns:
        How many more had ended before they could be cancelled.
    """
    chance = random.Random(seed)
    file = directory / "snapshot"
    began_s = time.monotonic()
    source.snapshot(file)
    whole_s = time.monotonic() - began_s
    cancelled = ended = 0
    while cancelled < count:
        file.unlink(missing_ok=True)
        after_s = chance.uniform(0, whole_s)
        if source.cancelled_snapshot(file, after_s):
            cancelled += 1
            assert not file.exists(), "something was left behind"
        else:
            ended += 1
            whole_s = min(whole_s, after_s)  # the first one may have been a slow one
            assert ended <= 10 * count, "they end too soon to be cancelled"
        assert_sound(source)
    file.unlink(missing_ok=True)
    return ended
