"""The ledger is of one instant when it is, and is caught when it is not: by its own audit and by
the independent check of an image."""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.ledger_check import LedgerNotReadyError, check_ledger
from tests.support.ledger_image import Header, Image
from tests.unit.board.guests.running import TIMEOUT_S, RunningGuest

PAGE = 4096
RAM_MIB = 6
ACCOUNT_OFFSET = 32 * 8

OwnGuest = Callable[[str], Path]


class Images:
    """Two images of one run, some transfers apart."""

    def __init__(self, older: bytes, newer: bytes) -> None:
        self.older, self.newer = older, newer
        self.header = Header(Image(newer, None))
        starts = range(0, len(newer), PAGE)
        self.changed = [at for at in starts if older[at : at + PAGE] != newer[at : at + PAGE]]

    def mixed(self, *older_pages: int) -> bytearray:
        """The newer image with these pages (their addresses) from the older one."""
        image = bytearray(self.newer)
        for at in older_pages:
            image[at : at + PAGE] = self.older[at : at + PAGE]
        return image


@pytest.fixture(scope="module")
def images(own_guest: OwnGuest) -> Images:
    with RunningGuest(
        own_guest("ledger"), "dma=entropy dma_us=1000 tick_ms=100", ram_mib=RAM_MIB, vcpus=2
    ) as guest:
        guest.wait("^ledger ready")
        guest.wait("^tick 1")
        older = guest.image()
        _wait_for_transfers(guest, 20_000)
        newer = guest.image()
    return Images(older, newer)


def test_images_are_consistent(images: Images) -> None:
    older, newer = check_ledger(images.older), check_ledger(images.newer)
    assert older.consistent, older
    assert newer.consistent, newer
    assert newer.transfers > older.transfers
    assert newer.dma > 0
    assert newer.total == newer.pages * 8 * 1000


def test_one_stale_page_is_caught(images: Images) -> None:
    missed = [at for at in images.changed if check_ledger(images.mixed(at)).consistent]
    # what a device may have been writing at the instant holds anything: one buffer of two pages
    assert len(missed) <= 2, [hex(at) for at in missed]
    assert len(images.changed) > 300


def test_each_kind_of_page_is_among_those(images: Images) -> None:
    header = images.header
    kinds = {
        "journal A": header.journal_a[0],
        "journal B": header.journal_b[1],
        "intent": header.intent[1],
        "producer": header.producer[0][1],
        "consumer": header.consumer[0][1],
        "DMA record": header.dma_gpa,
        "stack": header.stack_counter[1] & -PAGE,
        "counters": header.data_counter[0] & -PAGE,
        "page of accounts": header.page_gpa(header.pages // 2),
    }
    for kind, at in kinds.items():
        assert at in images.changed, kind
        assert not check_ledger(images.mixed(at)).consistent, kind


def test_half_of_the_ram_is_of_another_instant(images: Images) -> None:
    middle = len(images.newer) // 2
    lower = [at for at in images.changed if at < middle]
    upper = [at for at in images.changed if at >= middle]
    assert not check_ledger(images.mixed(*lower)).consistent
    assert not check_ledger(images.mixed(*upper)).consistent
    assert check_ledger(images.mixed(*lower, *upper)).consistent


def test_random_mixtures_are_caught(images: Images) -> None:
    rng = random.Random(1)
    for _ in range(20):
        some = rng.sample(images.changed, rng.randrange(3, len(images.changed) - 3))
        assert not check_ledger(images.mixed(*some)).consistent


def test_the_stop_between_two_vcpus(images: Images) -> None:
    """All that one vCPU writes is of another instant than all that the other writes."""
    header = images.header
    first = {header.page_gpa(page) for page in range(0, header.pages, 2)}
    first |= {header.journal_a[0], header.journal_b[0], header.intent[0]}
    first |= {header.stack_counter[0] & -PAGE, header.producer[0][0], header.producer[0][1]}
    first |= {header.consumer[0][0], header.consumer[1][0]}
    assert not check_ledger(images.mixed(*first)).consistent


def test_a_lost_message_is_caught(images: Images) -> None:
    image, waiting = _ring_with_messages(images)
    producer, message = waiting
    slot = producer + 128 + message % 64 * 32
    number = struct.unpack_from("<Q", image, slot)[0]
    assert number == message
    struct.pack_into("<Q", image, slot, message - 64)
    assert any("is lost" in problem for problem in check_ledger(image).problems)


def test_a_changed_amount_is_caught(images: Images) -> None:
    image, (producer, message) = _ring_with_messages(images)
    slot = producer + 128 + message % 64 * 32
    amount = struct.unpack_from("<Q", image, slot + 8)[0]
    struct.pack_into("<Q", image, slot + 8, amount + 1)
    report = check_ledger(image)
    assert any("on its way" in problem for problem in report.problems)
    assert any("the total is" in problem for problem in report.problems)


def test_a_duplicated_credit_is_caught(images: Images) -> None:
    image = bytearray(images.newer)
    page = images.header.page_gpa(images.header.pages // 2) + ACCOUNT_OFFSET
    balance = struct.unpack_from("<Q", image, page)[0]
    struct.pack_into("<Q", image, page, balance + 17)
    report = check_ledger(image)
    assert any("the total is" in problem for problem in report.problems)
    assert any("region" in problem for problem in report.problems)


def test_a_torn_page_is_caught(images: Images) -> None:
    busy = {_intent_page(images, cpu) for cpu in range(images.header.cpus)}
    at = next(
        at
        for at in images.changed
        if at >= images.header.first_page
        and at not in busy
        and images.older[at + 24 : at + 32] != images.newer[at + 24 : at + 32]
        and at < images.header.page_gpa(images.header.pages - 1)
    )
    image = bytearray(images.newer)
    image[at : at + PAGE // 2] = images.older[at : at + PAGE // 2]
    assert any("is torn" in problem for problem in check_ledger(image).problems)


def test_an_image_without_a_ledger() -> None:
    with pytest.raises(LedgerNotReadyError, match="no ledger"):
        check_ledger(bytes(4 << 20))
    with pytest.raises(LedgerNotReadyError, match="ends before"):
        check_ledger(bytes(1 << 20))


def test_the_check_is_fast_enough(images: Images) -> None:
    """A thousand snapshots of 32 MiB are checked in a minute or two."""
    started = time.process_time()
    check_ledger(images.newer)
    assert time.process_time() - started < 0.1 * RAM_MIB / 32 + 0.1


def _wait_for_transfers(guest: RunningGuest, count: int) -> None:
    """Until the guest has sent so many messages more, while it runs."""
    header = Header(Image(guest.read(0, RAM_MIB << 20), None))
    cpus = range(header.cpus)
    heads = [header.producer[one][other] + 24 for one in cpus for other in cpus]

    def sent() -> int:
        return sum(int.from_bytes(guest.read(at, 8), "little") for at in heads)

    wanted, deadline = sent() + count, time.monotonic() + TIMEOUT_S
    while sent() < wanted:
        assert time.monotonic() < deadline, "the guest does not go on"


def _intent_page(images: Images, cpu: int) -> int:
    page = struct.unpack_from("<Q", images.newer, images.header.intent[cpu] + 40)[0]
    return images.header.page_gpa(page)


def _ring_with_messages(images: Images) -> tuple[bytearray, tuple[int, int]]:
    """A copy of an image, and the producer's page and oldest message of a ring that has some."""
    for image in (images.newer, images.older):
        for one in range(images.header.cpus):
            for other in range(images.header.cpus):
                producer = images.header.producer[one][other]
                consumer = images.header.consumer[one][other]
                head = struct.unpack_from("<Q", image, producer + 24)[0]
                tail = struct.unpack_from("<Q", image, consumer + 24)[0]
                if head > tail + 1:
                    return bytearray(image), (producer, tail + 1)
    pytest.fail("no ring has messages")


@pytest.fixture(params=[2, 4])
def running(own_guest: OwnGuest, request: pytest.FixtureRequest) -> Iterator[RunningGuest]:
    vcpus, options = request.param, "tick_ms=100"
    with RunningGuest(own_guest("ledger"), options, ram_mib=RAM_MIB, vcpus=vcpus) as guest:
        guest.wait("^ledger ready")
        yield guest


def test_images_at_any_moment(running: RunningGuest) -> None:
    busy, rng = 0, random.Random(2)
    for _ in range(40):
        _wait_for_transfers(running, rng.randrange(1, 3000))
        report = check_ledger(running.image())
        assert report.consistent, report
        busy += report.busy_vcpus
    # so the check was tried on operations under way, too
    assert busy


def test_audit_and_power_off(running: RunningGuest) -> None:
    running.wait("^tick 1 transfers=[1-9][0-9]* gap_us=[0-9]+$")
    answer = running.ask("a", "^AUDIT")
    match = re.fullmatch(r"AUDIT ok transfers=(\d+) total=(\d+) dma=(\d+)", answer)
    assert match, answer
    assert all(int(number) for number in match.groups())
    assert "unknown command" in running.ask("audit", "known")
    # it goes on after an audit
    again = running.ask("a", "^AUDIT")
    assert int(again.split("transfers=")[1].split()[0]) > int(match.group(1))
    running.ask("q", "^ledger off")
    assert running.exit_status() == 0


@pytest.mark.parametrize("what", ["stale page", "account", "message", "entropy"])
def test_the_audit_finds_it(own_guest: OwnGuest, what: str) -> None:
    options = "tick_ms=100"
    with RunningGuest(own_guest("ledger"), options, ram_mib=RAM_MIB, vcpus=2) as guest:
        guest.wait("^tick 1")
        older = guest.image()
        header = Header(Image(older, None))
        guest.wait("^tick 2")
        guest.board.stop()
        if what == "stale page":
            pages = (header.page_gpa(page) for page in range(header.pages))
            at = next(at for at in pages if guest.read(at, PAGE) != older[at : at + PAGE])
            guest.write(at, older[at : at + PAGE])
        elif what == "account":
            at = header.page_gpa(header.pages - 1) + ACCOUNT_OFFSET
            balance = int.from_bytes(guest.read(at, 8), "little")
            guest.write(at, (balance + 1).to_bytes(8, "little"))
        elif what == "message":
            at = header.producer[0][0] + 32
            sent = int.from_bytes(guest.read(at, 8), "little")
            guest.write(at, (sent + 1).to_bytes(8, "little"))
        else:
            entropy = int.from_bytes(older[header.dma_gpa + 64 :][:8], "little")
            guest.write(entropy, bytes(64 * 8192))
        guest.board.cont()
        assert guest.ask("a", "^AUDIT").startswith("AUDIT FAILED")
        guest.console.send("q")
        assert guest.exit_status() == 1


def test_options(own_guest: OwnGuest, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    options = "rate=2 share=50 dma=all dma_us=500 tick_ms=200"
    with RunningGuest(own_guest("ledger"), options, ram_mib=RAM_MIB, vcpus=2, disk=disk) as guest:
        guest.wait("^ledger ready")
        for number in (1, 2, 3, 4, 5):
            line = guest.wait(f"^tick {number} ")
        # two page writes a transfer, 256 pages a MiB, a second; as much again for a slow host
        transfers = int(line.split("transfers=")[1].split()[0])
        assert 50 <= transfers <= 2 * 256
        answer = guest.ask("a", "^AUDIT")
        assert answer.startswith("AUDIT ok")
        assert int(answer.split("dma=")[1]) > 10
        report = check_ledger(guest.image())
        assert report.consistent, report
        assert report.pages < (RAM_MIB << 20) // PAGE // 2
    assert any(disk.read_bytes()[: 256 << 10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("sped=1", "^unknown option sped=1; known: rate= "),
        ("share=0", "^ledger: share= is a percentage"),
        ("dma=disk", "^ledger: dma=disk needs a disk"),
    ],
)
def test_wrong_options(own_guest: OwnGuest, options: str, message: str) -> None:
    with RunningGuest(own_guest("ledger"), options, ram_mib=RAM_MIB) as guest:
        guest.wait(message)
        assert guest.exit_status() == 2
