/* Proves that all of RAM is of one instant. Every vCPU has finished its operation and waits. */
#include "ledger.h"

static struct { u64 changes, hash, money; } found[MAX_VCPUS][MAX_REGIONS];

#define FAIL(...) return print("AUDIT FAILED " __VA_ARGS__), 0

/* Its sequences and its place; adds it up. */
static int audit_page(u64 page, u64 owner, u64 region)
{
    volatile u64 *words = page_at(page);
    u64 sequence = words[WORD_SEQUENCE_FIRST];
    if (words[WORD_MAGIC] != PAGE_MAGIC || words[WORD_NUMBER] != page
        || words[WORD_OWNER] != owner)
        FAIL("page %llu at 0x%llx is not itself\n", page, (u64)words);
    if (words[WORD_SEQUENCE_MIDDLE] != sequence || words[WORD_SEQUENCE_LAST] != sequence)
        FAIL("page %llu at 0x%llx is torn: sequences %llu, %llu, %llu\n", page, (u64)words,
             sequence, words[WORD_SEQUENCE_MIDDLE], words[WORD_SEQUENCE_LAST]);
    u64 money = 0;
    for (u64 account = 0; account < ACCOUNTS; account++)
        money += words[WORD_ACCOUNT + account * WORDS_PER_ACCOUNT];
    found[owner][region].changes += sequence;
    found[owner][region].hash += mix(page, sequence);
    found[owner][region].money += money;
    return 1;
}

static int audit_pages(void)
{
    volatile struct header *head = header();
    for (u64 cpu = 0; cpu < head->cpus; cpu++)
        for (u64 region = 0; region < MAX_REGIONS; region++)
            found[cpu][region].changes = found[cpu][region].hash = found[cpu][region].money = 0;
    u64 owner = 0, pages = head->pages, cpus = head->cpus, shift = head->region_shift;
    for (u64 page = 0; page < pages; page++) {
        if (!audit_page(page, owner, page >> shift)) return 0;
        if (++owner == cpus) owner = 0;
    }
    return 1;
}

static int audit_journal(volatile struct journal *journal, char name, u64 cpu)
{
    volatile struct header *head = header();
    volatile struct intent *intent = (volatile struct intent *)head->intent[cpu];
    u64 sends = 0, receives = 0;
    for (u64 peer = 0; peer < head->cpus; peer++) {
        sends += producer_of(cpu, peer)->head;
        receives += consumer_of(peer, cpu)->tail;
    }
    if (journal->magic != JOURNAL_MAGIC || journal->cpu != cpu)
        FAIL("journal %c of vCPU %llu is not itself\n", name, cpu);
    if (journal->sends != sends || journal->receives != receives || journal->ops != sends + receives)
        FAIL("journal %c of vCPU %llu has %llu operations, %llu sends and %llu receives, the rings "
             "have %llu and %llu\n", name, cpu, journal->ops, journal->sends, journal->receives,
             sends, receives);
    if (intent->stage != STAGE_IDLE || intent->op != journal->ops)
        FAIL("intent of vCPU %llu: stage %llu of operation %llu, journal %c has %llu\n", cpu,
             intent->stage, intent->op, name, journal->ops);
    for (u64 region = 0; region < head->regions; region++) {
        volatile struct region *entry = &journal->region[region];
        if (entry->changes == found[cpu][region].changes && entry->hash == found[cpu][region].hash
            && entry->money == found[cpu][region].money)
            continue;
        FAIL("region %llu of vCPU %llu: pages changed %llu times and hold %llu, journal %c says "
             "%llu and %llu\n", region, cpu, found[cpu][region].changes, found[cpu][region].money,
             name, entry->changes, entry->money);
    }
    return 1;
}

static int audit_counters(u64 cpu)
{
    volatile struct header *head = header();
    u64 ops = ((volatile struct journal *)head->journal_a[cpu])->ops;
    u64 stack = *(volatile u64 *)head->stack_counter[cpu];
    u64 data = *(volatile u64 *)head->data_counter[cpu];
    if (stack == ops && data == ops) return 1;
    FAIL("vCPU %llu has done %llu operations, its stack says %llu, .bss %llu\n", cpu, ops, stack,
         data);
}

/* Adds what is on its way to *in_flight. */
static int audit_ring(unsigned from, unsigned to, u64 *in_flight)
{
    volatile struct producer *producer = producer_of(from, to);
    volatile struct consumer *consumer = consumer_of(from, to);
    u64 head = producer->head, tail = consumer->tail, money = 0;
    if (producer->magic != PRODUCER_MAGIC || producer->from != from || producer->to != to
        || consumer->magic != CONSUMER_MAGIC || consumer->from != from || consumer->to != to)
        FAIL("ring %u to %u is not itself\n", from, to);
    if (head < tail || head - tail > RING_SLOTS)
        FAIL("ring %u to %u: %llu messages sent, %llu received\n", from, to, head, tail);
    for (u64 message = tail; message < head; message++) {
        if (producer->slot[message % RING_SLOTS].message != message)
            FAIL("ring %u to %u: message %llu is lost\n", from, to, message);
        money += producer->slot[message % RING_SLOTS].amount;
    }
    if (producer->sent - consumer->received != money)
        FAIL("ring %u to %u: sent %llu, received %llu, on its way %llu\n", from, to,
             producer->sent, consumer->received, money);
    *in_flight += money;
    return 1;
}

static int audit_dma(volatile struct dma *dma)
{
    static const char *const kinds[] = { "", "an entropy buffer lost its content",
        "a disk buffer lost its content", "the disk failed", "the disk holds something else" };
    if (dma->magic != DMA_MAGIC) FAIL("the DMA record is not itself\n");
    if (dma->steps != *(volatile u64 *)dma->counter_at)
        FAIL("dma: %llu steps recorded, %llu counted\n", dma->steps,
             *(volatile u64 *)dma->counter_at);
    if (dma->failures)
        FAIL("dma: %s (buffer %llu, %llu failures)\n", kinds[dma->failed_kind], dma->failed_buffer,
             dma->failures);
    for (u64 buffer = 0; buffer < ENTROPY_BUFFERS && dma->entropy_done; buffer++)
        if (buffer_sum(dma->entropy_at + buffer * ENTROPY_BYTES, ENTROPY_BYTES)
            != dma->entropy[buffer].sum)
            FAIL("dma: %s (buffer %llu)\n", kinds[1], buffer);
    for (u64 buffer = 0; buffer < DISK_BUFFERS && dma->disk_done; buffer++)
        if (buffer_sum(dma->disk_at + buffer * DISK_BYTES, DISK_BYTES) != dma->disk[buffer].sum)
            FAIL("dma: %s (buffer %llu)\n", kinds[2], buffer);
    return 1;
}

int audit(void)
{
    volatile struct header *head = header();
    volatile struct dma *dma = (volatile struct dma *)head->dma_address;
    u64 money = 0;
    if (!audit_pages()) return 0;
    for (u64 cpu = 0; cpu < head->cpus; cpu++) {
        if (!audit_journal((volatile struct journal *)head->journal_a[cpu], 'A', cpu)) return 0;
        if (!audit_journal((volatile struct journal *)head->journal_b[cpu], 'B', cpu)) return 0;
        if (!audit_counters(cpu)) return 0;
        for (u64 region = 0; region < head->regions; region++) money += found[cpu][region].money;
    }
    for (u64 from = 0; from < head->cpus; from++)
        for (u64 to = 0; to < head->cpus; to++)
            if (!audit_ring(from, to, &money)) return 0;
    if (money != head->total) FAIL("total %llu, should be %llu\n", money, head->total);
    if (!audit_dma(dma)) return 0;
    print("AUDIT ok transfers=%llu total=%llu dma=%llu\n", transfers_so_far(), money,
          dma->entropy_done + dma->disk_done);
    return 1;
}
