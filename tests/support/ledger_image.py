"""The ledger's records as they stand in guest RAM (``programs/ledger/layout.h``)."""

from __future__ import annotations

from mmap import mmap
from typing import TypeAlias

import msgspec

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap

LEDGER_GPA = 0x200000
DIMM_GPA = 0x100000000
PAGE_WORDS = 512
MAX_VCPUS = 8
RING_SLOTS = 64
ACCOUNTS = 8
SEND, RECEIVE = 1, 2

_HEADER_MAGIC = 0x313072656764656C
_BUSY = 1
_SEQUENCE_FIRST, _SEQUENCE_MIDDLE, _SEQUENCE_LAST = 3, 256, 511
_FIRST_ACCOUNT, _ACCOUNT_WORDS = 32, 64
_RING_HEADER_WORDS, _SLOT_WORDS = 16, 4
_JOURNAL_HEADER_WORDS, _REGION_WORDS = 16, 4
_DMA_HEADER_WORDS = 12


class LedgerNotReadyError(ValueError):
    """The image shows no ledger that has prepared its pages."""


class Image:
    """Words of guest memory by guest-physical address."""

    def __init__(self, ram: Buffer, dimm: Buffer | None) -> None:
        self._ram = memoryview(ram).cast("B").cast("Q")
        self._dimm = None if dimm is None else memoryview(dimm).cast("B").cast("Q")

    def _block(self, gpa: int) -> tuple[memoryview, int]:
        if gpa >= DIMM_GPA and self._dimm is not None:
            return self._dimm, (gpa - DIMM_GPA) // 8
        return self._ram, gpa // 8

    def words(self, gpa: int, count: int) -> list[int]:
        """So many words from an address on."""
        block, first = self._block(gpa)
        words: list[int] = block[first : first + count].tolist()
        if len(words) != count:
            raise LedgerNotReadyError(f"the image ends before {gpa:#x}")
        return words

    def column(self, gpa: int, word: int, pages: int) -> list[int]:
        """The same word of so many pages that follow each other."""
        if not pages:
            return []
        block, first = self._block(gpa)
        words: list[int] = block[first + word : first + pages * PAGE_WORDS : PAGE_WORDS].tolist()
        if len(words) != pages:
            raise LedgerNotReadyError(f"{len(words)} pages from {gpa:#x}, not {pages}")
        return words


class Header:
    """What the ledger says about its layout."""

    def __init__(self, image: Image) -> None:
        words = image.words(LEDGER_GPA, PAGE_WORDS)
        if words[0] != _HEADER_MAGIC:
            raise LedgerNotReadyError("there is no ledger in this image")
        if words[2] != 1:
            raise LedgerNotReadyError("the ledger has not prepared its pages")
        self.cpus, self.pages, self.ram_pages, self.first_page, self.dimm_page = words[3:8]
        self.region_shift, self.regions, self.total, self.dma_gpa = words[8:12]
        per_cpu = [words[at : at + MAX_VCPUS] for at in range(16, 56, MAX_VCPUS)]
        self.journal_a, self.journal_b, self.intent, self.data_counter, self.stack_counter = per_cpu
        self.producer = [words[56 + n * 8 : 64 + n * 8] for n in range(MAX_VCPUS)]
        self.consumer = [words[120 + n * 8 : 128 + n * 8] for n in range(MAX_VCPUS)]

    def page_gpa(self, page: int) -> int:
        """Where an account page lies."""
        if page < self.ram_pages:
            return self.first_page + page * PAGE_WORDS * 8
        return self.dimm_page + (page - self.ram_pages) * PAGE_WORDS * 8


class Pages:
    """All account pages, a list for each word that counts."""

    def __init__(self, image: Image, header: Header) -> None:
        def column(word: int) -> list[int]:
            in_ram = image.column(header.first_page, word, header.ram_pages)
            beyond = image.column(header.dimm_page, word, header.pages - header.ram_pages)
            return in_ram + beyond

        self.magic, self.number, self.owner = column(0), column(1), column(2)
        self.first = column(_SEQUENCE_FIRST)
        self.middle = column(_SEQUENCE_MIDDLE)
        self.last = column(_SEQUENCE_LAST)
        self.accounts = [
            column(_FIRST_ACCOUNT + account * _ACCOUNT_WORDS) for account in range(ACCOUNTS)
        ]
        self.money = list(map(sum, zip(*self.accounts, strict=True)))


class Intent(msgspec.Struct, frozen=True):
    """The operation that a vCPU is about to do, does, or has done."""

    magic: int
    cpu: int
    stage: int
    op: int
    kind: int
    page: int
    account: int
    amount: int
    sequence: int
    balance: int
    peer: int
    message: int
    ring_money: int

    @classmethod
    def read(cls, image: Image, gpa: int) -> Intent:
        return cls(*image.words(gpa, len(cls.__struct_fields__)))

    @property
    def busy(self) -> bool:
        """Whether the operation is under way."""
        return self.stage == _BUSY

    @property
    def change(self) -> int:
        """Of the account's balance."""
        return -self.amount if self.kind == SEND else self.amount

    def uses_ring(self, one: int, other: int) -> bool:
        """Whether the operation writes the ring from one vCPU to the other."""
        if self.kind == SEND:
            return (self.cpu, self.peer) == (one, other)
        return (self.peer, self.cpu) == (one, other)


class Region(msgspec.Struct):
    """What the pages of one region and vCPU add up to."""

    changes: int
    hash: int
    money: int


class Journal(msgspec.Struct, frozen=True):
    """One of the two journals of a vCPU."""

    magic: int
    cpu: int
    ops: int
    sends: int
    receives: int
    regions: list[Region]

    @classmethod
    def read(cls, image: Image, gpa: int, regions: int) -> Journal:
        words = image.words(gpa, _JOURNAL_HEADER_WORDS + regions * _REGION_WORDS)
        starts = range(_JOURNAL_HEADER_WORDS, len(words), _REGION_WORDS)
        return cls(*words[:5], [Region(*words[at : at + 3]) for at in starts])


class Ring(msgspec.Struct, frozen=True):
    """The messages from one vCPU to another."""

    producer: tuple[int, ...]
    consumer: tuple[int, ...]
    head: int
    sent: int
    tail: int
    received: int
    slots: list[int]

    @classmethod
    def read(cls, image: Image, producer_gpa: int, consumer_gpa: int) -> Ring:
        words = image.words(producer_gpa, _RING_HEADER_WORDS + RING_SLOTS * _SLOT_WORDS)
        consumer = image.words(consumer_gpa, 5)
        return cls(
            tuple(words[:3]),
            tuple(consumer[:3]),
            *words[3:5],
            *consumer[3:5],
            words[_RING_HEADER_WORDS:],
        )

    def slot(self, message: int) -> tuple[int, int]:
        """Number and amount of what stands where this message belongs."""
        at = message % RING_SLOTS * _SLOT_WORDS
        return self.slots[at], self.slots[at + 1]


class DmaBuffers(msgspec.Struct, frozen=True):
    """The buffers of one device. ``busy``: the number of the one that may be written, from 1."""

    name: str
    gpa: int
    words: int
    busy: int
    done: int
    sums: list[int]


class Dma(msgspec.Struct, frozen=True):
    """What the ledger has recorded of the devices' transfers."""

    magic: int
    failures: int
    steps: int
    steps_counted: int
    entropy: DmaBuffers
    disk: DmaBuffers

    @classmethod
    def read(cls, image: Image, gpa: int) -> Dma:
        words = image.words(gpa, PAGE_WORDS)
        magic, entropy_done, disk_done, entropy_busy, disk_busy, failures = words[:6]
        entropy_gpa, disk_gpa, steps, counter_gpa = words[8:_DMA_HEADER_WORDS]
        (counted,) = image.words(counter_gpa, 1)
        entropy = DmaBuffers(
            "entropy", entropy_gpa, 1024, entropy_busy, entropy_done, words[65:192:2]
        )
        disk = DmaBuffers("disk", disk_gpa, 512, disk_busy, disk_done, words[193:224:2])
        return cls(magic, failures, steps, counted, entropy, disk)
