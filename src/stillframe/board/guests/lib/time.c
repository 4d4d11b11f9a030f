/* The virtual clock and the timer. */
#include "library.h"

u64 clock_ns(void)
{
    /* the low word latches the high one, until the next reading on this vCPU */
    u64 flags = interrupts_off();
    u64 low = in32(PORT_CLOCK_LOW);
    u64 high = in32(PORT_CLOCK_HIGH);
    interrupts_restore(flags);
    return high << 32 | low;
}

u64 stopwatch_read(struct stopwatch *watch, u64 slept_ns)
{
    u64 now = clock_ns();
    u64 passed = now - watch->last_ns;
    if (passed > slept_ns && passed - slept_ns > watch->longest_ns)
        watch->longest_ns = passed - slept_ns;
    watch->last_ns = now;
    return passed;
}

static void timer_set(u64 interval_ns, u32 mode, unsigned cpu)
{
    out32(PORT_TIMER_LOW, (u32)interval_ns);
    out32(PORT_TIMER_HIGH, interval_ns >> 32);
    out32(PORT_TIMER_CONTROL, mode | cpu << TIMER_CPU_SHIFT);
}

void timer_once(u64 delay_ns, unsigned cpu)
{
    timer_set(delay_ns, TIMER_ONCE, cpu);
}

void timer_periodic(u64 period_ns, unsigned cpu)
{
    timer_set(period_ns, TIMER_PERIODIC, cpu);
}

void timer_stop(void)
{
    out32(PORT_TIMER_CONTROL, TIMER_OFF);
}

u32 timer_expirations(void)
{
    return in32(PORT_TIMER_CONTROL);
}
