/* The ledger: money that moves between accounts on all pages of RAM, by all vCPUs, so that any
 * page of another instant is found.
 *
 * Options: rate=MIB_PER_S (pages written, 4 KiB each; 0: full speed), share=PERCENT (of RAM),
 * dma=off|on|entropy|disk|all, dma_us=PERIOD, tick_ms=PERIOD.
 * Input, a line each: a (audit), q (power off; status 1 if an audit failed).
 */
#include "ledger.h"

#define WAKE_NS (2 * NS_PER_MS)    /* with rate=: how often vCPUs wake */
#define SERVICE_NS (1 * NS_PER_MS) /* at full speed: how often vCPU 0 looks at the clock */
#define MOST_STEPS 8192
#define BURST_NS (50 * NS_PER_MS)  /* what was not written in time is caught up, so much of it */

static struct barrier ready;
static u64 pages_per_s; /* of one vCPU; 0: no limit */

/* vCPU 0 counts requests and releases, the others what they have obeyed. */
static volatile u64 hold_request, hold_release;
static volatile struct { u64 held, unused[7]; } holds[MAX_VCPUS];

/* vCPU 0's */
static struct stopwatch watch;
static u64 next_tick_ns, tick_ns, ticks;
static int audits_failed;
static volatile int button;

static void hold(struct teller *teller)
{
    u64 request = hold_request;
    holds[teller->cpu].held = request;
    while (hold_release != request) {}
    teller->held = request;
}

static void hold_others(void)
{
    hold_request++;
    for (unsigned cpu = 1; cpu < board_info()->vcpus; cpu++) {
        wake(cpu);
        while (holds[cpu].held != hold_request) {}
    }
}

static void obey(const char *line)
{
    if (line[0] == 'q' && !line[1]) {
        hold_others();
        dma_finish();
        print("ledger off transfers=%llu\n", transfers_so_far());
        power_off(audits_failed ? 1 : 0);
    } else if (line[0] == 'a' && !line[1]) {
        hold_others();
        dma_finish();
        if (!audit()) audits_failed = 1;
        hold_release = hold_request;
        watch.last_ns = clock_ns(); /* an audit is no gap */
    } else {
        put_text("unknown command; known: a (audit), q (power off)\n");
    }
}

/* vCPU 0's other duties. */
static void serve(void)
{
    char line[64];
    dma_turn(watch.last_ns);
    if (watch.last_ns >= next_tick_ns) {
        print("tick %llu transfers=%llu gap_us=%llu\n", ++ticks, transfers_so_far(),
              watch.longest_ns / 1000);
        watch.longest_ns = 0;
        next_tick_ns += tick_ns;
        if (next_tick_ns < watch.last_ns) next_tick_ns = watch.last_ns + tick_ns;
    }
    if (button) obey("q");
    if (get_line(line, sizeof line)) obey(line);
}

static void run_at_full_speed(struct teller *teller)
{
    u64 steps = 64;
    for (;;) {
        for (u64 step = 0; step < steps; step++) {
            if (hold_request != teller->held && teller->cpu) hold(teller);
            transfer(teller);
        }
        if (teller->cpu) continue;
        u64 passed = stopwatch_read(&watch, 0);
        if (passed < SERVICE_NS / 2 && steps < MOST_STEPS) steps *= 2;
        if (passed > SERVICE_NS * 2 && steps > 1) steps /= 2;
        serve();
    }
}

static void run_at_rate(struct teller *teller)
{
    u64 last = clock_ns();
    s64 credit = 0; /* pages, times NS_PER_S; below 0: a transfer wrote more than there was */
    s64 most_credit = pages_per_s * BURST_NS;
    if (most_credit < (s64)NS_PER_S) most_credit = NS_PER_S;
    for (;;) {
        u64 now = clock_ns();
        credit += (now - last) * pages_per_s;
        if (credit > most_credit) credit = most_credit;
        last = now;
        while (credit >= (s64)NS_PER_S) {
            if (hold_request != teller->held && teller->cpu) hold(teller);
            credit -= transfer(teller) * NS_PER_S;
        }
        u64 flags = interrupts_off();
        if (teller->cpu == 0 || hold_request == teller->held) idle();
        interrupts_restore(flags);
        if (hold_request != teller->held && teller->cpu) hold(teller);
        if (teller->cpu) continue;
        stopwatch_read(&watch, WAKE_NS);
        serve();
    }
}

static void wake_all(unsigned line)
{
    for (unsigned cpu = 1; cpu < board_info()->vcpus; cpu++) wake(cpu);
}

static void button_pressed(unsigned line)
{
    button = power_button();
}

static void setup(void)
{
    static const char *const names[] = { "rate", "share", "dma", "dma_us", "tick_ms", 0 };
    options_known(names);
    int all = option_is("dma", "all");
    int disk = all || option_is("dma", "disk");
    int entropy = all || !(disk || option_is("dma", "off"));
    prepare_header(option_number("share", 100), entropy, disk);
    dma_setup(entropy, disk, option_number("dma_us", 4000) * 1000);
    pages_per_s = option_number("rate", 0) * 256 / board_info()->vcpus;
    if (option_number("rate", 0) && !pages_per_s) pages_per_s = 1;
    tick_ns = option_number("tick_ms", 1000) * NS_PER_MS;
}

void board_main(unsigned cpu)
{
    volatile u64 stack_counter = 0;
    struct teller teller = { .cpu = cpu, .stack_counter = &stack_counter };
    u64 started = clock_ns();
    teller.random = (cpu + 1) * 0x9e3779b97f4a7c15ULL;
    if (cpu == 0) setup();
    barrier_wait(&ready);
    prepare_own(&teller);
    barrier_wait(&ready);
    if (cpu == 0) {
        watch.last_ns = clock_ns();
        header()->ready = 1;
        print("ledger ready pages=%llu vcpus=%llu total=%llu prepare_ms=%llu\n", header()->pages,
              header()->cpus, header()->total, (watch.last_ns - started) / NS_PER_MS);
        watch.last_ns = clock_ns();
        next_tick_ns = watch.last_ns + tick_ns;
        interrupt_handle(LINE_POWER, button_pressed);
        if (pages_per_s) {
            interrupt_handle(LINE_TIMER, wake_all);
            timer_periodic(WAKE_NS, 0);
        }
    } else {
        interrupt_handle(LINE_WAKE, 0);
    }
    interrupts_on();
    if (pages_per_s) run_at_rate(&teller);
    run_at_full_speed(&teller);
}
