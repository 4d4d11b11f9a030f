/* Adds to memory with instructions that read and write it, under interrupts: each runs once. */
#include "board.h"

static u64 sums[2];
static volatile unsigned ticks;

static void on_tick(unsigned line)
{
    ticks++;
}

void board_main(unsigned cpu)
{
    if (cpu) return;
    interrupt_handle(LINE_TIMER, on_tick);
    timer_periodic(NS_PER_MS, 0);
    interrupts_on();
    print("once ready at=%llu\n", (u64)&sums);
    u64 rounds = 0;
    char line[4];
    while (!get_line(line, sizeof line)) {
        for (unsigned turn = 0; turn < 100000; turn++)
            __asm__ volatile("addq $1, %0; incq %1" : "+m"(sums[0]), "+m"(sums[1]));
        rounds += 100000;
    }
    print("once rounds=%llu added=%llu increased=%llu ticks=%u\n", rounds, sums[0], sums[1],
          ticks);
    power_off(0);
}
