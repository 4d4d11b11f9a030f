/* Exercises the guest library; test_library.py reads what it prints. */
#include "board.h"

static struct barrier barrier;
static volatile unsigned ticks, wakes[MAX_VCPUS];
static volatile double halves;
static u64 counted; /* by all vCPUs, under a lock unit */
static volatile u64 rounds[MAX_VCPUS];
static u8 sectors[2][1024];

static void on_tick(unsigned line)
{
    halves += 0.5; /* SSE registers in a handler */
    ticks++;
}

static void on_wake(unsigned line)
{
    wakes[this_cpu()]++;
}

static void check(const char *what, int holds)
{
    print("%s %s\n", holds ? "ok" : "WRONG", what);
}

static void texts(void)
{
    print("print %s %c %d %u %x %llu %llx %% %d\n", "text", 'c', -7, 4000000000U, 0xbeefU,
          18446744073709551615ULL, 0xfedcba9876543210ULL, 0);
    put_text("put_text ");
    put_number(1234567890123ULL);
    put_text("\n");
    print("options %llu %llu %d %d %s\n", option_number("number", 5), option_number("absent", 6),
          option_is("word", "two"), option_is("word", "tw"), option_text("absent") ? "some" : "none");
    print("board ram=%llu vcpus=%llu width=%llu height=%llu sectors=%llu\n",
          board_info()->ram_bytes, board_info()->vcpus, board_info()->width, board_info()->height,
          board_info()->disk_sectors);
    check("memory map", memory_start() >= 0x100000 && memory_start() % PAGE_BYTES == 0
          && memory_end() == board_info()->ram_bytes - board_info()->vcpus * 65536);
}

static void memory_functions(void)
{
    char text[32] = "abcdefghij", other[32];
    __builtin_memmove(text + 2, text, 8);
    check("memmove up", __builtin_memcmp(text, "ababcdefgh", 10) == 0);
    __builtin_memmove(text, text + 2, 8);
    check("memmove down", __builtin_memcmp(text, "abcdefghgh", 10) == 0);
    __builtin_memset(other, 'x', sizeof other);
    __builtin_memcpy(other + 1, text, 3);
    check("memcpy and memset", other[0] == 'x' && other[3] == 'c' && other[4] == 'x');
}

static void time(void)
{
    u64 before = clock_ns();
    double kept = 1.0;
    interrupt_handle(LINE_TIMER, on_tick);
    timer_periodic(2 * NS_PER_MS, 0);
    interrupts_on();
    while (ticks < 20) {
        kept *= 1.5; /* a handler between these must not change it */
        u64 flags = interrupts_off();
        if (ticks < 20) idle();
        interrupts_restore(flags);
        kept /= 1.5;
    }
    timer_stop();
    u64 took = clock_ns() - before;
    check("timer", took >= 38 * NS_PER_MS && halves * 2 == ticks && kept == 1.0);
    unsigned had = ticks;
    timer_once(NS_PER_MS, 0);
    while (ticks == had) idle();
    check("one shot", ticks == had + 1);
    timer_expirations();
    timer_once(NS_PER_MS, 0);
    while (ticks == had + 1) idle();
    check("expirations", timer_expirations() == 1 && timer_expirations() == 0);
    interrupts_restore(interrupts_off());
}

static void devices(void)
{
    u8 *page = (u8 *)memory_start();
    entropy_start(page, 256);
    while (entropy_left()) {}
    unsigned zeros = 0;
    for (unsigned at = 0; at < 256; at++) zeros += page[at] == 0;
    check("entropy", zeros < 16 && page[256] == 0 && random_word() != random_word());

    for (unsigned at = 0; at < sizeof sectors[0]; at++) sectors[0][at] = at * 7;
    int written = disk_write(3, sectors[0], 2) && disk_flush() && disk_read(3, sectors[1], 2);
    check("disk", written && __builtin_memcmp(sectors[0], sectors[1], 1024) == 0);
    check("disk refuses", !disk_read(board_info()->disk_sectors, sectors[1], 1));
    framebuffer()[5] = 0x123456;
}

/* Every vCPU adds under a lock, and meets the others after each round. */
static int together(unsigned cpu)
{
    int apart = 0;
    for (u64 round = 1; round <= 50; round++) {
        rounds[cpu] = round;
        barrier_wait(&barrier);
        for (unsigned other = 0; other < board_info()->vcpus; other++)
            apart |= rounds[other] != round;
        lock_take(3);
        u64 seen = *(volatile u64 *)&counted;
        for (volatile int spin = 0; spin < 50; spin++) {}
        *(volatile u64 *)&counted = seen + 1;
        lock_release(3);
        barrier_wait(&barrier);
    }
    return !apart;
}

static void others(void)
{
    check("locks", counted == 50 * board_info()->vcpus);
    check("lock units", lock_try(4) && !lock_try(4));
    lock_release(4);
    for (unsigned cpu = 1; cpu < board_info()->vcpus; cpu++) wake(cpu);
    for (unsigned cpu = 1; cpu < board_info()->vcpus; cpu++)
        while (!wakes[cpu]) {}
    check("wake", 1);
}

void board_main(unsigned cpu)
{
    lock_take(3);  /* a line is printed in pieces */
    check("this_cpu", this_cpu() == cpu);
    lock_release(3);
    barrier_wait(&barrier);
    int met = together(cpu);
    if (cpu) {
        interrupt_handle(LINE_WAKE, on_wake);
        while (!wakes[cpu]) idle();
        return;
    }
    check("barrier", met);
    texts();
    memory_functions();
    others();
    time();
    devices();
    char line[8];
    put_text("name?\n");
    wait_line(line, sizeof line);
    print("line '%s'\n", line);
    if (option_is("end", "panic")) panic("as wished");
    if (option_is("end", "exception")) __asm__ volatile("ud2");
    if (option_is("end", "return")) return;
    power_off(option_number("status", 7));
}
