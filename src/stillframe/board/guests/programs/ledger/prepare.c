/* Lays out memory, and fills it. */
#include "ledger.h"

static volatile struct { u64 ops, unused[7]; } data_counters[MAX_VCPUS];

static u64 take_pages(u64 *at, u64 pages)
{
    u64 address = *at;
    *at += pages * PAGE_BYTES;
    return address;
}

static void refuse(const char *why)
{
    print("ledger: %s\n", why);
    power_off(2);
}

/* By vCPU 0: header, control pages below and above the accounts, and the accounts' number. */
void prepare_header(u64 share_percent, int entropy, int disk)
{
    const struct board_info *info = board_info();
    volatile struct header *head = header();
    u64 cpus = info->vcpus;
    if (memory_start() > LEDGER_ADDRESS) refuse("the program is too large");
    if (share_percent < 1 || share_percent > 100) refuse("share= is a percentage, 1 to 100");
    if (disk && info->disk_sectors < DISK_SLOTS * DISK_BYTES / 512)
        refuse("dma=disk needs a disk of 256 KiB");

    u64 low = LEDGER_ADDRESS + PAGE_BYTES;
    for (u64 cpu = 0; cpu < cpus; cpu++) head->journal_a[cpu] = take_pages(&low, 1);
    for (u64 from = 0; from < cpus; from++)
        for (u64 to = 0; to < cpus; to++) head->producer[from][to] = take_pages(&low, 1);
    head->dma_address = take_pages(&low, 1);

    u64 entropy_pages = entropy ? ENTROPY_BUFFERS * ENTROPY_BYTES / PAGE_BYTES : 0;
    u64 disk_pages = disk ? DISK_BUFFERS * DISK_BYTES / PAGE_BYTES : 0;
    u64 high_pages = entropy_pages + disk_pages + cpus * cpus + 2 * cpus;
    u64 end = memory_end() & ~(PAGE_BYTES - 1);
    if (low + (high_pages + cpus * MAX_REGIONS) * PAGE_BYTES > end) refuse("too little RAM");
    u64 ram_pages = (end - low) / PAGE_BYTES - high_pages;
    u64 dimm_pages = info->dimm_bytes / PAGE_BYTES;
    ram_pages = ram_pages * share_percent / 100;
    dimm_pages = dimm_pages * share_percent / 100;

    head->first_page = low;
    head->dimm_page = info->dimm_address;
    head->ram_pages = ram_pages;
    head->pages = ram_pages + dimm_pages;
    u64 shift = 0;
    while ((head->pages - 1) >> shift >= MAX_REGIONS) shift++;
    head->region_shift = shift;
    head->regions = ((head->pages - 1) >> shift) + 1;
    head->total = head->pages * ACCOUNTS * FIRST_BALANCE;
    head->cpus = cpus;

    /* far away from what they must agree with: right below the stacks */
    u64 high = end - high_pages * PAGE_BYTES;
    volatile struct dma *dma = (volatile struct dma *)head->dma_address;
    dma->magic = DMA_MAGIC;
    dma->entropy_at = take_pages(&high, entropy_pages);
    dma->disk_at = take_pages(&high, disk_pages);
    for (u64 from = 0; from < cpus; from++)
        for (u64 to = 0; to < cpus; to++) head->consumer[from][to] = take_pages(&high, 1);
    for (u64 cpu = 0; cpu < cpus; cpu++) {
        head->intent[cpu] = take_pages(&high, 1);
        head->data_counter[cpu] = (u64)&data_counters[cpu].ops;
    }
    for (u64 cpu = 0; cpu < cpus; cpu++) head->journal_b[cpu] = take_pages(&high, 1);
    head->version = 1;
    head->magic = HEADER_MAGIC;
}

static void format_page(u64 page, u64 owner)
{
    volatile u64 *words = page_at(page);
    words[WORD_MAGIC] = PAGE_MAGIC;
    words[WORD_NUMBER] = page;
    words[WORD_OWNER] = owner;
    words[WORD_SEQUENCE_FIRST] = FIRST_SEQUENCE;
    for (u64 account = 0; account < ACCOUNTS; account++)
        words[WORD_ACCOUNT + account * WORDS_PER_ACCOUNT] = FIRST_BALANCE;
    words[WORD_SEQUENCE_MIDDLE] = words[WORD_SEQUENCE_LAST] = FIRST_SEQUENCE;
}

static void format_journal(volatile struct journal *journal, unsigned cpu)
{
    journal->magic = JOURNAL_MAGIC;
    journal->cpu = cpu;
}

/* By every vCPU: the pages that it alone writes. RAM is zero so far. */
void prepare_own(struct teller *teller)
{
    volatile struct header *head = header();
    unsigned cpu = teller->cpu;
    head->stack_counter[cpu] = (u64)teller->stack_counter;
    teller->intent = (volatile struct intent *)head->intent[cpu];
    teller->journal_a = (volatile struct journal *)head->journal_a[cpu];
    teller->journal_b = (volatile struct journal *)head->journal_b[cpu];
    teller->intent->magic = INTENT_MAGIC;
    teller->intent->cpu = cpu;
    format_journal(teller->journal_a, cpu);
    format_journal(teller->journal_b, cpu);
    for (unsigned peer = 0; peer < head->cpus; peer++) {
        volatile struct producer *producer = producer_of(cpu, peer);
        producer->magic = PRODUCER_MAGIC;
        producer->from = cpu;
        producer->to = peer;
        volatile struct consumer *consumer = consumer_of(peer, cpu);
        consumer->magic = CONSUMER_MAGIC;
        consumer->from = peer;
        consumer->to = cpu;
    }
    for (u64 page = cpu; page < head->pages; page += head->cpus) {
        format_page(page, cpu);
        volatile struct region *region = &teller->journal_a->region[page >> head->region_shift];
        region->changes += FIRST_SEQUENCE;
        region->hash += mix(page, FIRST_SEQUENCE);
        region->money += ACCOUNTS * FIRST_BALANCE;
        teller->own_pages++;
    }
    for (u64 number = 0; number < head->regions; number++) {
        volatile struct region *from = &teller->journal_a->region[number];
        volatile struct region *to = &teller->journal_b->region[number];
        to->changes = from->changes;
        to->hash = from->hash;
        to->money = from->money;
    }
}
