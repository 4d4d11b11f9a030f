/* Two clocks: the TSC, read at every page, and the seconds of the host's wall clock.
 *
 * Under TCG the TSC stands still while the VM is stopped (QEMU cpu_disable_ticks), so the guest
 * cannot see a stop with it, nor with any other timer of QEMU's virtual clock. The CMOS clock does
 * run on (QEMU hw/rtc/mc146818rtc.c, with -rtc clock=host, the default): what passed between two
 * changes of its seconds, and did not pass on the TSC, is the time in which the VM was stopped.
 * It becomes known at the next change, so up to a second later.
 * Under KVM the TSC runs on in a stop, which then is a gap like any other.
 */
#ifndef SF_CLOCK_H
#define SF_CLOCK_H

#include "page.h"
#include "ports.h"

#define COARSE_POLL_US 500
/* A stop of up to 20 ms is measured to 50 us, a longer one to 500 us. */
#define FINE_POLL_US 50
#define FINE_BEFORE_US 20000
#define FINE_AFTER_US 2000
/* By how much the two clocks may drift apart in a second. */
#define DRIFT_US 50
#define SECONDS_PER_DAY 86400

struct clock {
    u64 ticks_per_second;
    u64 ticks_per_us;
    u64 start_ticks;
    u64 last_ticks;      /* the latest reading */
    u64 next_poll_ticks; /* when to look at the CMOS clock again */
    u64 poll_ticks;      /* just before the last look: it showed `second` */
    /* the seconds changed last between these two; 0: not yet known */
    u64 edge_low_ticks, edge_high_ticks;
    u64 edges;
    u32 second;          /* of the minute, as the CMOS clock had it last */
    u32 day_second;      /* at the last edge */
    u64 second_gap_ticks; /* longest gap between two readings since the last edge */
    u64 tick_gap_ticks;   /* ... since the last tick line */
    u64 max_gap_ticks;    /* ... since the start or the last reset */
    u64 tick_stop_us;     /* stops that were found since the last tick line */
    u64 max_stop_us;      /* the most in one second, since the start or the last reset */
    u64 max_stall_us;     /* longest gap + stops of one second: no stall was longer */
    u64 over_1ms;         /* gaps of 1 ms and more since the start or the last reset */
};

static inline u64 read_ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

static inline u32 cmos_read(u8 index)
{
    out8(0x70, index);
    u8 bcd = in8(0x71);
    return (bcd >> 4) * 10 + (bcd & 15);
}

static inline u32 cmos_day_second(void)
{
    return (cmos_read(4) & 0x7f) * 3600 + cmos_read(2) * 60 + cmos_read(0);
}

static inline void clock_reset(struct clock *clock)
{
    clock->second_gap_ticks = clock->tick_gap_ticks = clock->max_gap_ticks = 0;
    clock->tick_stop_us = clock->max_stop_us = clock->max_stall_us = clock->over_1ms = 0;
}

/* The seconds have changed to `day_second` between `low` and `high`: see how much of them the TSC
 * has missed.
 *
 * A look at the clock may come late, so all moments are intervals. Where the interval seen overlaps
 * the one expected, there was no stop, and the moment is known better than before.
 */
static inline void clock_edge(struct clock *clock, u32 day_second, u64 low, u64 high)
{
    u64 stop_us = 0;
    if (clock->edge_high_ticks) {
        u64 seconds = (day_second + SECONDS_PER_DAY - clock->day_second) % SECONDS_PER_DAY;
        u64 drift = seconds * DRIFT_US * clock->ticks_per_us;
        u64 expected_low = clock->edge_low_ticks + seconds * clock->ticks_per_second - drift;
        u64 expected_high = clock->edge_high_ticks + seconds * clock->ticks_per_second + drift;
        if (high < expected_low) {
            stop_us = (expected_low - high + expected_high - low) / 2 / clock->ticks_per_us;
        } else if (low <= expected_high) {
            if (expected_low > low) low = expected_low;
            if (expected_high < high) high = expected_high;
        }
        u64 stall_us = stop_us + clock->second_gap_ticks / clock->ticks_per_us;
        if (stall_us > clock->max_stall_us) clock->max_stall_us = stall_us;
    }
    if (stop_us > clock->max_stop_us) clock->max_stop_us = stop_us;
    clock->tick_stop_us += stop_us;
    clock->second_gap_ticks = 0;
    clock->edge_low_ticks = low;
    clock->edge_high_ticks = high;
    clock->day_second = day_second;
    clock->edges++;
}

static inline void clock_poll(struct clock *clock)
{
    u64 before = read_ticks();
    u32 second = cmos_read(0);
    u64 after = read_ticks();
    if (second != clock->second) {
        u32 day_second;
        /* On a busy host a second may pass between two readings: all are of one and the same. */
        do {
            before = read_ticks();
            day_second = cmos_day_second();
            after = read_ticks();
        } while (day_second != cmos_day_second());
        clock->second = day_second % 60;
        clock_edge(clock, day_second, clock->poll_ticks, after);
    }
    clock->poll_ticks = before;
    s64 to_edge = (s64)(clock->edge_low_ticks + clock->ticks_per_second - after);
    int fine = to_edge < (s64)(FINE_BEFORE_US * clock->ticks_per_us)
        && to_edge > -(s64)(FINE_AFTER_US * clock->ticks_per_us);
    clock->next_poll_ticks = after + (fine ? FINE_POLL_US : COARSE_POLL_US) * clock->ticks_per_us;
}

/* One reading of the TSC; to be called at least once per page. */
static inline u64 clock_now(struct clock *clock)
{
    u64 now = read_ticks();
    s64 gap = (s64)(now - clock->last_ticks);
    clock->last_ticks = now;
    if (gap > (s64)clock->second_gap_ticks) {
        clock->second_gap_ticks = gap;
        if ((u64)gap > clock->tick_gap_ticks) clock->tick_gap_ticks = gap;
        if ((u64)gap > clock->max_gap_ticks) clock->max_gap_ticks = gap;
    } else if (gap > (s64)clock->tick_gap_ticks) {
        clock->tick_gap_ticks = gap;
    }
    if (gap >= (s64)(1000 * clock->ticks_per_us)) clock->over_1ms++;
    if ((s64)(now - clock->next_poll_ticks) >= 0) clock_poll(clock);
    return now;
}

static inline void clock_start(struct clock *clock, u64 ticks_per_second)
{
    clock->ticks_per_second = ticks_per_second;
    clock->ticks_per_us = ticks_per_second / 1000000;
    clock->poll_ticks = read_ticks();
    clock->second = cmos_read(0);
    clock->edge_low_ticks = clock->edge_high_ticks = 0;
    clock->start_ticks = clock->last_ticks = clock->next_poll_ticks = read_ticks();
    clock_reset(clock);
}

static inline u64 clock_us(struct clock *clock)
{
    return (clock->last_ticks - clock->start_ticks) / clock->ticks_per_us;
}

#endif
