/* Transfers: what a vCPU writes, and in which order (layout.h). */
#include "ledger.h"

#define LARGEST_AMOUNT 64

struct operation {
    u64 kind, page, account, amount, peer, message, ring_money;
};

static void write_journal(volatile struct journal *journal, const struct operation *operation,
                          u64 op, u64 hash_change)
{
    volatile struct region *region = &journal->region[operation->page >> header()->region_shift];
    journal->ops = op;
    if (operation->kind == KIND_SEND) {
        journal->sends++;
    } else {
        journal->receives++;
    }
    region->changes++;
    region->hash += hash_change;
    if (operation->kind == KIND_SEND) {
        region->money -= operation->amount;
    } else {
        region->money += operation->amount;
    }
}

/* Everything up to the ring. */
static void begin(struct teller *teller, const struct operation *operation)
{
    volatile struct intent *intent = teller->intent;
    volatile u64 *words = page_at(operation->page);
    volatile u64 *account = &words[WORD_ACCOUNT + operation->account * WORDS_PER_ACCOUNT];
    u64 sequence = words[WORD_SEQUENCE_FIRST] + 1;
    u64 balance = *account;

    intent->op = ++teller->ops;
    intent->kind = operation->kind;
    intent->page = operation->page;
    intent->account = operation->account;
    intent->amount = operation->amount;
    intent->sequence = sequence;
    intent->balance = balance;
    intent->peer = operation->peer;
    intent->message = operation->message;
    intent->ring_money = operation->ring_money;
    intent->stage = STAGE_BUSY;

    words[WORD_SEQUENCE_FIRST] = sequence;
    *account = operation->kind == KIND_SEND ? balance - operation->amount
                                            : balance + operation->amount;
    words[WORD_SEQUENCE_MIDDLE] = sequence;
    words[WORD_SEQUENCE_LAST] = sequence;

    u64 hash_change = mix(operation->page, sequence) - mix(operation->page, sequence - 1);
    write_journal(teller->journal_a, operation, teller->ops, hash_change);
    write_journal(teller->journal_b, operation, teller->ops, hash_change);
}

static void finish(struct teller *teller)
{
    *teller->stack_counter = teller->ops;
    *(volatile u64 *)header()->data_counter[teller->cpu] = teller->ops;
    teller->intent->stage = STAGE_IDLE;
}

static u64 random_below(struct teller *teller, u64 limit)
{
    return (next_random(&teller->random) >> 32) * limit >> 32;
}

static u64 own_page(struct teller *teller)
{
    return random_below(teller, teller->own_pages) * header()->cpus + teller->cpu;
}

static int receive(struct teller *teller, unsigned peer)
{
    volatile struct producer *producer = producer_of(peer, teller->cpu);
    volatile struct consumer *consumer = consumer_of(peer, teller->cpu);
    u64 message = consumer->tail;
    if (producer->head == message) return 0;
    u64 amount = producer->slot[message % RING_SLOTS].amount;
    struct operation operation = {
        KIND_RECEIVE, own_page(teller), random_below(teller, ACCOUNTS), amount, peer, message,
        consumer->received,
    };
    begin(teller, &operation);
    consumer->received += amount;
    consumer->tail = message + 1;
    finish(teller);
    return 1;
}

static int send(struct teller *teller, unsigned peer)
{
    volatile struct producer *producer = producer_of(teller->cpu, peer);
    u64 message = producer->head;
    if (message - consumer_of(teller->cpu, peer)->tail == RING_SLOTS) return 0;
    u64 page = own_page(teller);
    u64 account = random_below(teller, ACCOUNTS);
    u64 balance = page_at(page)[WORD_ACCOUNT + account * WORDS_PER_ACCOUNT];
    if (!balance) return 0;
    u64 most = balance < LARGEST_AMOUNT ? balance : LARGEST_AMOUNT;
    u64 amount = 1 + random_below(teller, most);
    struct operation operation = {
        KIND_SEND, page, account, amount, peer, message, producer->sent,
    };
    begin(teller, &operation);
    producer->slot[message % RING_SLOTS].message = message;
    producer->slot[message % RING_SLOTS].amount = amount;
    producer->slot[message % RING_SLOTS].page = page;
    producer->sent += amount;
    producer->head = message + 1; /* last: the consumer reads the slot as soon as it sees this */
    finish(teller);
    return 1;
}

unsigned transfer(struct teller *teller)
{
    unsigned written = 0;
    for (unsigned peer = 0; peer < header()->cpus; peer++) written += receive(teller, peer);
    unsigned peer = random_below(teller, header()->cpus);
    if (!send(teller, peer)) return written;
    return written + 1;
}

u64 transfers_so_far(void)
{
    u64 sum = 0;
    for (unsigned from = 0; from < header()->cpus; from++)
        for (unsigned to = 0; to < header()->cpus; to++) sum += producer_of(from, to)->head;
    return sum;
}
