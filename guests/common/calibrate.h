/* How fast the TSC runs, by ACPI's timer, where SeaBIOS puts it on pc and q35.
 *
 * The timer follows QEMU's virtual clock (hw/acpi/core.c), so it is as exact as the host's clock;
 * a kernel's own idea of the TSC may be off by 500 ppm, too much to find a stop within a second.
 */
#ifndef SF_CALIBRATE_H
#define SF_CALIBRATE_H

#include "clock.h"
#include "page.h"
#include "ports.h"

#define PM_TIMER 0x608
#define PM_TIMER_HZ 3579545
#define PM_TIMER_MASK 0xffffff
#define ATTEMPTS 20

/* The timer and the TSC at one moment: the reading that took the least time. */
static inline u32 read_pm_timer(u64 *ticks)
{
    u64 best = ~0ULL;
    u32 timer = 0;
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        u64 before = read_ticks();
        u32 value = in32(PM_TIMER) & PM_TIMER_MASK;
        u64 took = read_ticks() - before;
        if (took >= best) continue;
        best = took;
        timer = value;
        *ticks = before + took / 2;
    }
    return timer;
}

/* TSC ticks per second, measured for 0.2 s. */
static inline u64 calibrate(void)
{
    u64 start_ticks = 0, end_ticks = 0;
    u32 start = read_pm_timer(&start_ticks), end;
    do end = read_pm_timer(&end_ticks);
    while (((end - start) & PM_TIMER_MASK) < PM_TIMER_HZ / 5);
    return (end_ticks - start_ticks) * PM_TIMER_HZ / ((end - start) & PM_TIMER_MASK);
}

#endif
