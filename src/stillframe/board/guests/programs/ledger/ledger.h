/* What the ledger's parts share. */
#ifndef LEDGER_H
#define LEDGER_H

#include "layout.h"

/* One vCPU's own; it lies on its stack, as does the counter of its operations. */
struct teller {
    unsigned cpu;
    u64 ops;
    u64 random;
    u64 own_pages;
    u64 held; /* the last hold that it obeyed */
    volatile u64 *stack_counter;
    volatile struct intent *intent;
    volatile struct journal *journal_a, *journal_b;
};

static inline volatile struct header *header(void)
{
    return (volatile struct header *)LEDGER_ADDRESS;
}

static inline volatile u64 *page_at(u64 page)
{
    volatile struct header *head = header();
    if (page < head->ram_pages) return (volatile u64 *)(head->first_page + page * PAGE_BYTES);
    return (volatile u64 *)(head->dimm_page + (page - head->ram_pages) * PAGE_BYTES);
}

static inline volatile struct producer *producer_of(unsigned from, unsigned to)
{
    return (volatile struct producer *)header()->producer[from][to];
}

static inline volatile struct consumer *consumer_of(unsigned from, unsigned to)
{
    return (volatile struct consumer *)header()->consumer[from][to];
}

static inline u64 next_random(u64 *state)
{
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

/* prepare.c */
void prepare_header(u64 share_percent, int entropy, int disk);
void prepare_own(struct teller *teller);

/* transfer.c */
unsigned transfer(struct teller *teller); /* receives and sends; how many pages it wrote */
u64 transfers_so_far(void);

/* dma.c */
void dma_setup(int entropy, int disk, u64 period_ns);
void dma_turn(u64 now_ns);
void dma_finish(void); /* waits for the transfers under way */
u64 buffer_sum(u64 address, u64 bytes);

/* audit.c: 1 if all is well; with every vCPU held */
int audit(void);

#endif
