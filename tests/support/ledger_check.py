"""Tells from the guest's RAM alone whether it shows one instant of the ledger.

It knows the layout and the order of writing from ``programs/ledger/layout.h``, and shares no code
with the guest's own audit. The image may be of any moment: a vCPU may be inside an operation. Then
its intent record tells the old and the new value of each word that the operation writes, and the
words must be new up to some point and old after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.support.ledger_image import (
    ACCOUNTS,
    RECEIVE,
    RING_SLOTS,
    SEND,
    Buffer,
    Dma,
    Header,
    Image,
    Intent,
    Journal,
    LedgerNotReadyError,
    Pages,
    Region,
    Ring,
)

__all__ = ["LedgerNotReadyError", "LedgerReport", "check_ledger"]

PROBLEMS_KEPT = 20

_WORD = (1 << 64) - 1
_PAGE_MAGIC = 0x7365676170636361
_JOURNAL_MAGIC = 0x736C616E72756F6A
_INTENT_MAGIC = 0x73746E65746E6921
_PRODUCER_MAGIC = 0x7265637564727021
_CONSUMER_MAGIC = 0x72656D736E6F6321
_DMA_MAGIC = 0x736B636162616D64


class LedgerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`check_ledger` found.

    ``transfers``: sent so far. ``total``: all money, on accounts and on its way.
    ``busy_vcpus``: how many were inside an operation. ``dma``: transfers by devices so far.
    ``problems``: the first of ``problem_count`` reasons why this is not one instant.
    """

    pages: int
    transfers: int
    total: int
    busy_vcpus: int
    dma: int
    problems: tuple[str, ...]
    problem_count: int

    @property
    def consistent(self) -> bool:
        """Whether the image shows one instant."""
        return self.problem_count == 0

    def __str__(self) -> str:
        if self.consistent:
            return f"consistent: {self.pages} pages, {self.transfers} transfers, {self.dma} by DMA"
        return f"TORN: {self.problem_count} problems: " + "; ".join(self.problems)


def check_ledger(ram: Buffer, dimm: Buffer | None = None) -> LedgerReport:
    """Check the RAM of one snapshot.

    Args:
        ram: the block ``board.ram`` from guest-physical address 0.
        dimm: the block ``board.dimm0``, if the guest found one when it started.

    Raises:
        LedgerNotReadyError: it shows no ledger, or one that has not said that it is ready.
    """
    return _Check(Image(ram, dimm)).run()


class _Step(msgspec.Struct, frozen=True):
    """One word that an operation writes: what it holds, and what it must hold before and after."""

    what: str
    value: int
    old: int
    new: int


class _Check:
    """One image under examination; ``problems`` grows."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.header = header = Header(image)
        self.pages = Pages(image, header)
        self.cpus = range(header.cpus)
        self.intents = [Intent.read(image, gpa) for gpa in header.intent[: header.cpus]]
        self.rings = [
            [
                Ring.read(image, header.producer[one][other], header.consumer[one][other])
                for other in self.cpus
            ]
            for one in self.cpus
        ]
        self.problems: list[str] = []
        self.count = 0

    def problem(self, text: str) -> None:
        self.count += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(text)

    def run(self) -> LedgerReport:
        self._check_identities()
        self._check_whole_pages()
        under_way = [self._operation_under_way(cpu) for cpu in self.cpus]
        for cpu, operation in enumerate(under_way):
            self._check_cpu(cpu, operation)
        total = sum(self.pages.money)
        for one in self.cpus:
            for other in self.cpus:
                total += self._check_ring(one, other, under_way)
        total += sum(self._between(operation) for operation in under_way if operation)
        if total != self.header.total:
            self.problem(f"the total is {total}, not {self.header.total}")
        return LedgerReport(
            pages=self.header.pages,
            transfers=sum(ring.head for rings in self.rings for ring in rings),
            total=total,
            busy_vcpus=sum(intent.busy for intent in self.intents),
            dma=self._check_dma(),
            problems=tuple(self.problems),
            problem_count=self.count,
        )

    def _check_identities(self) -> None:
        header, pages = self.header, self.pages
        owners = [page % header.cpus for page in range(header.pages)]
        if (
            pages.magic == [_PAGE_MAGIC] * header.pages
            and pages.number == list(range(header.pages))
            and pages.owner == owners
        ):
            return
        for page, words in enumerate(zip(pages.magic, pages.number, pages.owner, strict=True)):
            if words != (_PAGE_MAGIC, page, owners[page]):
                self.problem(f"page {page} is not itself")

    def _check_whole_pages(self) -> None:
        """Only the page of an operation under way may differ within itself."""
        pages = self.pages
        if pages.first == pages.middle == pages.last:
            return
        excused = {intent.page for intent in self.intents if intent.busy}
        for page, sequences in enumerate(zip(pages.first, pages.middle, pages.last, strict=True)):
            if len(set(sequences)) > 1 and page not in excused:
                self.problem(f"page {page} is torn: sequences {sequences}")

    def _operation_under_way(self, cpu: int) -> Intent | None:
        """The intent of this vCPU, when an operation is under way and makes sense."""
        intent = self.intents[cpu]
        if (intent.magic, intent.cpu) != (_INTENT_MAGIC, cpu):
            self.problem(f"the intent page of vCPU {cpu} is not itself")
            return None
        if not intent.busy:
            if intent.stage:
                self.problem(f"vCPU {cpu}: no such stage: {intent.stage}")
            return None
        if (
            intent.page < self.header.pages
            and intent.page % self.header.cpus == cpu
            and intent.account < ACCOUNTS
            and intent.kind in (SEND, RECEIVE)
            and intent.peer < self.header.cpus
            and intent.amount > 0
        ):
            return intent
        self.problem(f"the intent of vCPU {cpu} makes no sense: {intent}")
        return None

    def _check_cpu(self, cpu: int, operation: Intent | None) -> None:
        """Everything that this vCPU alone writes, in the order in which it does."""
        steps = [] if operation is None else self._page_steps(operation)
        before = self._before(cpu, operation)
        for name, gpa in (("A", self.header.journal_a[cpu]), ("B", self.header.journal_b[cpu])):
            journal = Journal.read(self.image, gpa, self.header.regions)
            steps += self._journal_steps(
                f"journal {name} of vCPU {cpu}", journal, before, operation
            )
        if operation is not None:
            steps += self._ring_steps(operation)
        steps += self._counter_steps(cpu, before, operation)
        self._check_order(cpu, steps)
        # while it fills in the next intent, that has a number of its own already
        numbers = (before.ops, before.ops + 1) if operation is None else (before.ops + 1,)
        if self.intents[cpu].op not in numbers:
            self.problem(
                f"the intent of vCPU {cpu} is operation {self.intents[cpu].op}, "
                f"the rings have {before.ops}"
            )

    def _before(self, cpu: int, operation: Intent | None) -> Journal:
        """What the journals of this vCPU said before its operation, by pages and rings."""
        header, pages = self.header, self.pages
        sends = sum(ring.head for ring in self.rings[cpu])
        receives = sum(rings[cpu].tail for rings in self.rings)
        regions = []
        for region in range(header.regions):
            start = region << header.region_shift
            end = min(start + (1 << header.region_shift), header.pages)
            own = slice(start + (cpu - start) % header.cpus, end, header.cpus)
            sequences = pages.first[own]
            mixed = _mix_sum(range(own.start, end, header.cpus), sequences)
            regions.append(Region(sum(sequences), mixed, sum(pages.money[own])))
        if operation is not None:
            if operation.kind == SEND:
                sends += operation.message - self.rings[cpu][operation.peer].head
            else:
                receives += operation.message - self.rings[operation.peer][cpu].tail
            now = pages.first[operation.page]
            old = operation.sequence - 1
            undone = regions[operation.page >> header.region_shift]
            undone.changes += old - now
            undone.hash += _mix(operation.page, old) - _mix(operation.page, now)
            undone.hash &= _WORD
            undone.money += operation.balance - pages.accounts[operation.account][operation.page]
        return Journal(_JOURNAL_MAGIC, cpu, sends + receives, sends, receives, regions)

    def _page_steps(self, operation: Intent) -> list[_Step]:
        pages, page, new = self.pages, operation.page, operation.sequence
        balance = pages.accounts[operation.account][page]
        after = operation.balance + operation.change
        return [
            _Step(f"first sequence of page {page}", pages.first[page], new - 1, new),
            _Step(f"account of page {page}", balance, operation.balance, after),
            _Step(f"middle sequence of page {page}", pages.middle[page], new - 1, new),
            _Step(f"last sequence of page {page}", pages.last[page], new - 1, new),
        ]

    def _journal_steps(
        self, name: str, journal: Journal, before: Journal, operation: Intent | None
    ) -> list[_Step]:
        """Whatever the operation does not write must be as before; the rest is returned."""
        if (journal.magic, journal.cpu) != (before.magic, before.cpu):
            self.problem(f"{name} is not itself")
        written = -1 if operation is None else operation.page >> self.header.region_shift
        for number, (says, found) in enumerate(zip(journal.regions, before.regions, strict=True)):
            if number != written and says != found:
                self.problem(f"{name}: region {number} is {says}, its pages are {found}")
        if operation is None:
            says_counts = (journal.ops, journal.sends, journal.receives)
            if says_counts != (before.ops, before.sends, before.receives):
                self.problem(
                    f"{name}: (operations, sends, receives) are {says_counts}, "
                    f"the rings have {(before.ops, before.sends, before.receives)}"
                )
            return []
        counts = [
            (journal.sends, before.sends),
            (journal.receives, before.receives),
        ]
        (kind, kind_before), (other, other_before) = (
            counts if operation.kind == SEND else reversed(counts)
        )
        if other != other_before:
            self.problem(f"{name}: {other} of the other kind, the rings have {other_before}")
        page, sequence = operation.page, operation.sequence
        now, old = journal.regions[written], before.regions[written]
        hashed = (old.hash + _mix(page, sequence) - _mix(page, sequence - 1)) & _WORD
        return [
            _Step(f"{name}: operations", journal.ops, before.ops, before.ops + 1),
            _Step(f"{name}: sends or receives", kind, kind_before, kind_before + 1),
            _Step(f"{name}: changes", now.changes, old.changes, old.changes + 1),
            _Step(f"{name}: hash", now.hash, old.hash, hashed),
            _Step(f"{name}: money", now.money, old.money, old.money + operation.change),
        ]

    def _ring_steps(self, operation: Intent) -> list[_Step]:
        message, money = operation.message, operation.ring_money
        if operation.kind == SEND:
            ring = self.rings[operation.cpu][operation.peer]
            return [
                _Step("money sent", ring.sent, money, money + operation.amount),
                _Step("messages sent", ring.head, message, message + 1),
            ]
        ring = self.rings[operation.peer][operation.cpu]
        return [
            _Step("money received", ring.received, money, money + operation.amount),
            _Step("messages received", ring.tail, message, message + 1),
        ]

    def _counter_steps(self, cpu: int, before: Journal, operation: Intent | None) -> list[_Step]:
        (stack,) = self.image.words(self.header.stack_counter[cpu], 1)
        (data,) = self.image.words(self.header.data_counter[cpu], 1)
        new = before.ops if operation is None else before.ops + 1
        return [
            _Step("counter on the stack", stack, before.ops, new),
            _Step("counter in .bss", data, before.ops, new),
        ]

    def _check_order(self, cpu: int, steps: Sequence[_Step]) -> None:
        undone: str | None = None
        for step in steps:
            if step.value == step.new:
                if undone is not None:
                    self.problem(f"vCPU {cpu}: {step.what} is written, before it {undone} is not")
            elif step.value == step.old:
                undone = undone or step.what
            else:
                self.problem(
                    f"vCPU {cpu}: {step.what} is {step.value}, neither {step.old} nor {step.new}"
                )

    def _between(self, operation: Intent) -> int:
        """Money that is in no account and no ring; negative: in both."""
        balance = self.pages.accounts[operation.account][operation.page]
        if balance == operation.balance:
            return 0
        if operation.kind == SEND:
            waits = self.rings[operation.cpu][operation.peer].head == operation.message
        else:
            waits = self.rings[operation.peer][operation.cpu].tail == operation.message
        return -operation.change if waits else 0

    def _check_ring(self, one: int, other: int, under_way: list[Intent | None]) -> int:
        """The money on its way from one vCPU to the other."""
        ring = self.rings[one][other]
        name = f"ring {one} to {other}"
        if ring.producer != (_PRODUCER_MAGIC, one, other):
            self.problem(f"the producer's page of {name} is not itself")
        if ring.consumer != (_CONSUMER_MAGIC, one, other):
            self.problem(f"the consumer's page of {name} is not itself")
        if not 0 <= ring.head - ring.tail <= RING_SLOTS:
            self.problem(f"{name}: {ring.head} messages sent, {ring.tail} received")
            return 0
        money = 0
        for message in range(ring.tail, ring.head):
            number, amount = ring.slot(message)
            if number != message:
                self.problem(f"{name}: message {message} is lost")
            money += amount
        sent, received = ring.sent, ring.received
        # what an operation has written of the money counts when the message counts
        for operation in under_way:
            if operation is None or not operation.uses_ring(one, other):
                continue
            if operation.kind == SEND:
                sent = operation.ring_money + operation.amount * (ring.head - operation.message)
            else:
                received = operation.ring_money + operation.amount * (ring.tail - operation.message)
        if sent - received != money:
            self.problem(f"{name}: sent {sent}, received {received}, on its way {money}")
        return money

    def _check_dma(self) -> int:
        dma = Dma.read(self.image, self.header.dma_gpa)
        if dma.magic != _DMA_MAGIC:
            self.problem("the DMA record is not itself")
        # the count outside of the record is written after it
        if dma.steps - dma.steps_counted not in (0, 1):
            self.problem(f"the DMA record has {dma.steps} steps, {dma.steps_counted} are counted")
        if dma.failures:
            self.problem(f"the guest found {dma.failures} failures of DMA")
        for device in (dma.entropy, dma.disk):
            for buffer, recorded in enumerate(device.sums if device.done else ()):
                gpa = device.gpa + buffer * device.words * 8
                if buffer + 1 == device.busy:
                    continue
                if sum(self.image.words(gpa, device.words)) & _WORD != recorded:
                    self.problem(f"{device.name} buffer {buffer} is not as its transfer left it")
        return dma.entropy.done + dma.disk.done


def _mix(page: int, sequence: int) -> int:
    return _mix_sum(range(page, page + 1), [sequence])


def _mix_sum(pages: range, sequences: list[int]) -> int:
    """The sum of ``mix`` of layout.h over pages; a good part of a check's time goes here."""
    total = 0
    for page, sequence in zip(pages, sequences, strict=True):
        x = (page * 0x9E3779B97F4A7C15 + sequence) & _WORD
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & _WORD
        total += x ^ x >> 29
    return total & _WORD
