/* What vCPUs do between each other: lock units, and a barrier of words with one writer each. */
#include "library.h"

int lock_try(unsigned unit)
{
    return in8(PORT_LOCKS + unit) == 1;
}

void lock_take(unsigned unit)
{
    while (!lock_try(unit)) {}
}

void lock_release(unsigned unit)
{
    out8(PORT_LOCKS + unit, 0);
}

void barrier_wait(struct barrier *barrier)
{
    u64 round = ++barrier->cpu[this_cpu()].arrived;
    for (unsigned cpu = 0; cpu < board_info()->vcpus; cpu++)
        while (barrier->cpu[cpu].arrived < round) {}
}
