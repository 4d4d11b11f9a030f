/* The guest library of the board: everything that a guest may call.
 *
 * A guest defines board_main(), which every vCPU calls once, and is built by
 * `stillframe board build NAME.c`. There is no C library; memcpy, memmove, memset and memcmp exist,
 * since compilers call them. The machine: docs/design/board.md.
 *
 * Atomic instructions (lock prefix, __atomic_*, __sync_*) are NOT atomic between vCPUs, and fences
 * do nothing. Plain loads and stores of up to eight bytes, aligned, are seen in program order (use
 * volatile). So let every word have one writer, or use the lock units below.
 */
#ifndef BOARD_H
#define BOARD_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#define PAGE_BYTES 4096ULL
#define MAX_VCPUS 8
#define NS_PER_MS 1000000ULL
#define NS_PER_S 1000000000ULL

/* Yours. When vCPU 0 returns, the board powers off with status 0; any other vCPU just halts. */
void board_main(unsigned cpu);

/* ---- the board ---- */

struct board_info {
    u64 magic;
    u64 ram_bytes;    /* guest-physical, from 0 */
    u64 vcpus;
    u64 framebuffer;  /* address: XRGB8888, rows packed */
    u64 width, height;
    u64 disk_sectors; /* of 512 bytes; 0: no disk */
    u64 dimm_address, dimm_bytes; /* hot-plugged RAM; 0, 0: none */
    u64 command_line; /* address of a text */
};

const struct board_info *board_info(void);
unsigned this_cpu(void);
u64 memory_start(void); /* the first address after the program, at a page boundary */
u64 memory_end(void);   /* the first address of the stacks: free RAM lies between */

__attribute__((noreturn)) void power_off(unsigned status);    /* the board's exit status, 0-255 */
__attribute__((noreturn)) void system_reset(void);
__attribute__((noreturn)) void panic(const char *text);       /* prints it, then GUEST_PANICKED */
int power_button(void); /* 1: it was pressed since the last call */

/* ---- the command line: words "name=value", the last of a name counts ---- */

const char *option_text(const char *name);          /* the value and what follows it, or 0 */
u64 option_number(const char *name, u64 otherwise); /* decimal */
int option_is(const char *name, const char *value);
/* Powers off with status 2 and says why, when a word is none of these names (ends with a 0). */
void options_known(const char *const *names);

/* ---- console: the serial line ---- */

void put_text(const char *text);
void put_number(u64 value);
/* One piece even when vCPUs print at the same time. %s %c %d %u %x %llu %llx %%; 400 bytes. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
/* A line that has arrived, without its end: 1, else 0 at once. For vCPU 0. */
int get_line(char *line, unsigned size);
void wait_line(char *line, unsigned size); /* idles until there is one; turns interrupts on */

/* ---- time: the virtual clock, which stands still while the board is stopped ---- */

u64 clock_ns(void);

/* The longest time between two readings, besides what was meant to be slept. */
struct stopwatch {
    u64 last_ns, longest_ns;
};
u64 stopwatch_read(struct stopwatch *watch, u64 slept_ns); /* ns since the last reading */

void timer_once(u64 delay_ns, unsigned cpu);      /* one timer; its line interrupts that vCPU */
void timer_periodic(u64 period_ns, unsigned cpu);
void timer_stop(void);
u32 timer_expirations(void); /* since the last call */

/* ---- interrupts: off at the start ---- */

enum { LINE_TIMER = 2, LINE_WAKE = 3, LINE_UART = 4, LINE_BLOCK = 5, LINE_ENTROPY = 6, LINE_POWER = 7 };

/* Called with interrupts off, on the vCPU that was interrupted. */
typedef void interrupt_handler(unsigned line);
/* One handler a line for all vCPUs (0: nothing to do but wake); enables the line on this vCPU. */
void interrupt_handle(unsigned line, interrupt_handler *handler);
u64 interrupts_off(void); /* the flags before, for interrupts_restore */
void interrupts_restore(u64 flags);
void interrupts_on(void);
/* Waits for an interrupt, or for nothing: it may return early. Call it with interrupts off, after
 * you looked whether there is something to do: one that comes in between is not slept through.
 * Interrupts are on while it waits, and then as before. */
void idle(void);
void wake(unsigned cpu); /* interrupts it by LINE_WAKE */

/* ---- between vCPUs ---- */

#define LOCK_UNITS 15 /* 0-14; the console has one more */
int lock_try(unsigned unit); /* 1: taken */
void lock_take(unsigned unit);
void lock_release(unsigned unit);

/* All vCPUs wait for each other. Every word of it has one writer, so it needs no lock. */
struct barrier {
    struct { volatile u64 arrived; u64 unused[7]; } cpu[MAX_VCPUS];
};
void barrier_wait(struct barrier *barrier);

/* ---- devices that write guest RAM by themselves ---- */

u32 random_word(void);
void entropy_start(void *to, u32 length_bytes);
u32 entropy_left(void); /* bytes; 0: done */

enum { DISK_READ = 1, DISK_WRITE = 2, DISK_FLUSH = 3 };
enum { DISK_IDLE = 0, DISK_BUSY = 1, DISK_DONE = 2, DISK_ERROR = 3 };
void disk_start(u32 command, u64 sector, const void *memory, u32 sectors); /* at most 2048 */
u32 disk_status(void); /* done and error are told once */
int disk_read(u64 sector, void *to, u32 sectors);          /* these three wait; 1: done */
int disk_write(u64 sector, const void *from, u32 sectors);
int disk_flush(void);

static inline volatile u32 *framebuffer(void)
{
    return (volatile u32 *)board_info()->framebuffer;
}

/* ---- ports ---- */

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out32(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

#endif
