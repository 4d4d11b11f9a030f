/* Devices that write into RAM by themselves, and the record of what they wrote (by vCPU 0). */
#include "ledger.h"

#define SECTORS_PER_SLOT (DISK_BYTES / 512)
#define WRITE_BUFFERS (DISK_BUFFERS / 2) /* the first half is written from, the other read into */

static int entropy_on, disk_on;
static u64 period_ns, next_ns;
static u64 entropy_next, disk_number, disk_slot;
static volatile struct { u64 steps, unused[7]; } counter;

static volatile struct dma *dma(void)
{
    return (volatile struct dma *)header()->dma_address;
}

u64 buffer_sum(u64 address, u64 bytes)
{
    const volatile u64 *words = (const volatile u64 *)address;
    u64 sum = 0;
    for (u64 word = 0; word < bytes / 8; word += 4)
        sum += words[word] + words[word + 1] + words[word + 2] + words[word + 3];
    return sum;
}

static u64 entropy_buffer(u64 buffer)
{
    return dma()->entropy_at + buffer * ENTROPY_BYTES;
}

static u64 disk_buffer(u64 buffer)
{
    return dma()->disk_at + buffer * DISK_BYTES;
}

static void failed(u64 kind, u64 buffer)
{
    if (dma()->failures++) return;
    dma()->failed_kind = kind;
    dma()->failed_buffer = buffer;
}

/* Around whatever changes the record, so that an older record is told from its age alone. */
static void step(void)
{
    dma()->steps++;
}

static void stepped(void)
{
    counter.steps = dma()->steps;
}

void dma_setup(int entropy, int disk, u64 period)
{
    entropy_on = entropy;
    disk_on = disk;
    period_ns = period;
    dma()->counter_at = (u64)&counter.steps;
}

/* A buffer is looked at before it is used again, so that nothing that was lost is ever hidden. */
static void entropy_begin(void)
{
    u64 buffer = entropy_next++ % ENTROPY_BUFFERS;
    if (buffer_sum(entropy_buffer(buffer), ENTROPY_BYTES) != dma()->entropy[buffer].sum)
        failed(1, buffer);
    step();
    dma()->entropy_busy = buffer + 1;
    stepped();
    entropy_start((void *)entropy_buffer(buffer), ENTROPY_BYTES);
}

static void entropy_end(void)
{
    u64 buffer = dma()->entropy_busy - 1;
    step();
    dma()->entropy[buffer].sum = buffer_sum(entropy_buffer(buffer), ENTROPY_BYTES);
    dma()->entropy[buffer].number = ++dma()->entropy_done;
    dma()->entropy_busy = 0;
    stepped();
}

static u64 slot_word(u64 slot, u64 number, u64 word)
{
    return mix(slot << 32 | word, number);
}

/* Even turns write a slot of the disk, odd ones read one back into another buffer. */
static void disk_begin(void)
{
    int reads = disk_number & 1;
    u64 turn = disk_number++ >> 1;
    u64 buffer = turn % WRITE_BUFFERS + (reads ? WRITE_BUFFERS : 0);
    volatile u64 *words = (volatile u64 *)disk_buffer(buffer);
    if (buffer_sum(disk_buffer(buffer), DISK_BYTES) != dma()->disk[buffer].sum) failed(2, buffer);
    /* what is read back was written 16 turns ago, or just now in the first turns */
    disk_slot = (reads && turn >= 16 ? turn - 16 : turn) % DISK_SLOTS;
    step();
    dma()->disk_busy = buffer + 1;
    if (!reads) {
        for (u64 word = 0; word < DISK_BYTES / 8; word++)
            words[word] = slot_word(disk_slot, turn + 1, word);
        dma()->disk[buffer].sum = buffer_sum(disk_buffer(buffer), DISK_BYTES);
        dma()->slot_number[disk_slot] = turn + 1;
    }
    stepped();
    disk_start(reads ? DISK_READ : DISK_WRITE, disk_slot * SECTORS_PER_SLOT, (const void *)words,
               SECTORS_PER_SLOT);
}

static void disk_end(u32 status)
{
    u64 buffer = dma()->disk_busy - 1;
    const volatile u64 *words = (const volatile u64 *)disk_buffer(buffer);
    step();
    if (status != DISK_DONE) failed(3, buffer);
    if (buffer >= WRITE_BUFFERS) {
        u64 number = dma()->slot_number[disk_slot];
        for (u64 word = 0; word < DISK_BYTES / 8; word++) {
            if (words[word] == slot_word(disk_slot, number, word)) continue;
            failed(4, buffer);
            break;
        }
        dma()->disk[buffer].sum = buffer_sum(disk_buffer(buffer), DISK_BYTES);
    }
    dma()->disk[buffer].number = ++dma()->disk_done;
    dma()->disk_busy = 0;
    stepped();
}

static void complete(void)
{
    if (dma()->entropy_busy && !entropy_left()) entropy_end();
    if (dma()->disk_busy) {
        u32 status = disk_status();
        if (status != DISK_BUSY) disk_end(status);
    }
}

void dma_turn(u64 now_ns)
{
    if (!entropy_on && !disk_on) return;
    complete();
    if (now_ns < next_ns) return;
    next_ns = now_ns + period_ns;
    if (entropy_on && !dma()->entropy_busy) entropy_begin();
    if (disk_on && !dma()->disk_busy) disk_begin();
}

void dma_finish(void)
{
    while (dma()->entropy_busy || dma()->disk_busy) complete();
}
