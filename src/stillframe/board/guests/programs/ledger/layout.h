/* Where the ledger keeps what, in which order it writes, and what is true at every instant.
 * tests/support/ledger_check.py knows the same.
 *
 * Accounts are on pages. Each page belongs to one vCPU (page number modulo vCPUs), and nobody else
 * writes it. An operation of a vCPU changes one account of one of its pages: it SENDs money into a
 * ring (one per pair of vCPUs, one producer, one consumer), or RECEIVEs money from one.
 *
 * An operation writes, in this order:
 *   intent page      op, kind, page, account, amount, sequence, balance, peer, message,
 *                    ring_money; then stage
 *   account page     sequence_first, the account, sequence_middle, sequence_last
 *   journal A        ops, sends or receives; of the page's region: changes, hash, money
 *   journal B        the same, on a page far away
 *   SEND             producer: a slot, sent, head
 *   RECEIVE          consumer: received, tail
 *   counters         one on the vCPU's stack, one in .bss
 *   intent page      stage
 *
 * So while stage is IDLE, of each vCPU and region: the sequences of its pages add up to `changes`,
 * mix(page, sequence) to `hash`, the accounts to `money`; both journals and counters agree; and the
 * accounts together with what is in the rings make `total`. While stage is BUSY, the writes above
 * are done up to some point and not after it, and the intent tells their old and new values.
 */
#ifndef LEDGER_LAYOUT_H
#define LEDGER_LAYOUT_H

#include "board.h"

#define LEDGER_ADDRESS 0x200000ULL
#define MAX_REGIONS 32
#define RING_SLOTS 64
#define PAGE_WORDS 512

#define HEADER_MAGIC 0x313072656764656cULL   /* "ledger01" */
#define PAGE_MAGIC 0x7365676170636361ULL     /* "accpages" */
#define JOURNAL_MAGIC 0x736c616e72756f6aULL  /* "journals" */
#define INTENT_MAGIC 0x73746e65746e6921ULL   /* "!intents" */
#define PRODUCER_MAGIC 0x7265637564727021ULL /* "!prducer" */
#define CONSUMER_MAGIC 0x72656d736e6f6321ULL /* "!consmer" */
#define DMA_MAGIC 0x736b636162616d64ULL      /* "dmabacks" */

/* One page; all of these structures begin at a page boundary. */
struct header {
    u64 magic, version, ready;
    u64 cpus, pages;
    u64 ram_pages;                 /* the first so many account pages are in RAM from first_page */
    u64 first_page, dimm_page;     /* the others from dimm_page */
    u64 region_shift, regions;     /* a page's region: number >> shift */
    u64 total, dma_address;
    u64 unused[4];
    u64 journal_a[MAX_VCPUS], journal_b[MAX_VCPUS], intent[MAX_VCPUS];
    u64 data_counter[MAX_VCPUS], stack_counter[MAX_VCPUS];
    u64 producer[MAX_VCPUS][MAX_VCPUS], consumer[MAX_VCPUS][MAX_VCPUS]; /* [from][to] */
};

/* Words of an account page. */
enum {
    WORD_MAGIC, WORD_NUMBER, WORD_OWNER, WORD_SEQUENCE_FIRST,
    WORD_ACCOUNT = 32, WORDS_PER_ACCOUNT = 64, ACCOUNTS = 8,
    WORD_SEQUENCE_MIDDLE = 256, WORD_SEQUENCE_LAST = 511,
};
#define FIRST_BALANCE 1000
#define FIRST_SEQUENCE 1

enum { STAGE_IDLE = 0, STAGE_BUSY = 1 };
enum { KIND_SEND = 1, KIND_RECEIVE = 2 };

struct intent {
    u64 magic, cpu, stage, op;
    u64 kind, page, account, amount;
    u64 sequence, balance; /* of the page after, of the account before */
    u64 peer, message;
    u64 ring_money; /* `sent` or `received` before */
};

struct journal {
    u64 magic, cpu, ops, sends, receives;
    u64 unused[11];
    struct region { u64 changes, hash, money, unused; } region[MAX_REGIONS];
};

struct producer {
    u64 magic, from, to, head, sent; /* messages and money so far */
    u64 unused[11];
    struct { u64 message, amount, page, unused; } slot[RING_SLOTS];
};

struct consumer {
    u64 magic, from, to, tail, received;
};

/* What devices have written, by vCPU 0: the sum of the words of each buffer, as the last transfer
 * left it. `*_busy` is the number of the buffer that a device may be writing, from 1; 0: none. */
#define ENTROPY_BUFFERS 64
#define ENTROPY_BYTES 8192
#define DISK_BUFFERS 16
#define DISK_SLOTS 64 /* places on the disk, one buffer each */
#define DISK_BYTES 4096

struct dma {
    u64 magic, entropy_done, disk_done, entropy_busy, disk_busy;
    u64 failures, failed_buffer, failed_kind;
    u64 entropy_at, disk_at;       /* the buffers' addresses */
    u64 steps, counter_at;         /* beginnings and ends; there a second count, written after */
    u64 unused[52];
    struct { u64 number, sum; } entropy[ENTROPY_BUFFERS], disk[DISK_BUFFERS];
    u64 slot_number[DISK_SLOTS];   /* what was last written there */
};

/* Sums of it tell any two sets of (page, sequence) apart: the last step is not linear. */
static inline u64 mix(u64 page, u64 sequence)
{
    u64 x = page * 0x9e3779b97f4a7c15ULL + sequence;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ULL;
    return x ^ x >> 29;
}

#endif
