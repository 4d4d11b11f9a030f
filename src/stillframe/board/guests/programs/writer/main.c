/* The writer: one vCPU writes one counter over all pages in the order of addresses, pass after
 * pass (page.h), so that a snapshot may hold two neighbouring values only, the larger first.
 *
 * Options: rate=MIB_PER_S (0: full speed), pages=NUMBER (0: all of RAM), whole=1 (every word of a
 * page), tick_ms=PERIOD.
 * Input, a line each: a (audit), q (power off; status 1 if an audit failed).
 */
#include "board.h"
#include "page.h"

#define WAKE_NS (2 * NS_PER_MS)
#define SERVICE_NS (1 * NS_PER_MS)
#define MOST_PAGES 4096           /* between two readings of the clock */
#define BURST_NS (50 * NS_PER_MS) /* what was not written in time is caught up, so much of it */

static u64 first_page, pages, whole, rate_pages_per_s;

/* The next page to write is `position`, in the pass `pass`. */
static u64 position, pass = 1, pages_written;

static struct stopwatch watch;
static u64 ticks, tick_ns, next_tick_ns;
static int audits_failed;

static volatile u64 *page_at(u64 index)
{
    return (volatile u64 *)(first_page + index * PAGE_BYTES);
}

static void write_pages(u64 count)
{
    pages_written += count;
    for (; count; count--) {
        write_page(page_at(position), position, pass, whole);
        if (++position == pages) position = 0, pass++;
    }
}

/* Every page is compared with what the registers know that was written. */
static void audit(void)
{
    u64 bad = 0, bad_page = 0, bad_word = 0;
    for (u64 index = 0; index < pages; index++) {
        u64 counter = index < position ? pass : pass - 1;
        int word = wrong_word(page_at(index), index, counter, pages, whole);
        if (word >= 0 && !bad++) bad_page = index, bad_word = word;
    }
    if (bad) {
        audits_failed = 1;
        print("AUDIT FAILED pages=%llu pass=%llu edge=%llu bad=%llu first_page=%llu word=%llu "
              "found=0x%llx\n", pages, pass, position, bad, bad_page, bad_word,
              page_at(bad_page)[bad_word]);
    } else {
        print("AUDIT ok pages=%llu pass=%llu edge=%llu\n", pages, pass, position);
    }
    watch.last_ns = clock_ns(); /* an audit is no gap */
}

static void obey(const char *line)
{
    if (line[0] == 'a' && !line[1]) {
        audit();
    } else if (line[0] == 'q' && !line[1]) {
        print("writer off passes=%llu\n", pass - 1);
        power_off(audits_failed);
    } else {
        put_text("unknown command; known: a (audit), q (power off)\n");
    }
}

static void serve(void)
{
    char line[64];
    if (watch.last_ns >= next_tick_ns) {
        print("tick %llu passes=%llu pages=%llu gap_us=%llu\n", ++ticks, pass - 1, pages_written,
              watch.longest_ns / 1000);
        watch.longest_ns = 0;
        next_tick_ns += tick_ns;
        if (next_tick_ns < watch.last_ns) next_tick_ns = watch.last_ns + tick_ns;
    }
    if (get_line(line, sizeof line)) obey(line);
}

static void run_at_full_speed(void)
{
    u64 count = 16;
    for (;;) {
        write_pages(count);
        u64 passed = stopwatch_read(&watch, 0);
        if (passed < SERVICE_NS / 2 && count < MOST_PAGES) count *= 2;
        if (passed > SERVICE_NS * 2 && count > 1) count /= 2;
        serve();
    }
}

static void run_at_rate(void)
{
    u64 credit = 0; /* pages, times NS_PER_S */
    u64 most_credit = rate_pages_per_s * BURST_NS;
    interrupt_handle(LINE_TIMER, 0);
    timer_periodic(WAKE_NS, 0);
    for (;;) {
        idle();
        credit += stopwatch_read(&watch, WAKE_NS) * rate_pages_per_s;
        if (credit > most_credit) credit = most_credit;
        write_pages(credit / NS_PER_S);
        credit %= NS_PER_S;
        serve();
    }
}

static void power_button_pressed(unsigned line)
{
    if (power_button()) power_off(audits_failed);
}

static void setup(void)
{
    static const char *const names[] = { "rate", "pages", "whole", "tick_ms", 0 };
    options_known(names);
    first_page = (memory_start() + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    u64 most = (memory_end() - first_page) / PAGE_BYTES;
    pages = option_number("pages", 0);
    if (!pages) pages = most;
    if (pages > most) {
        print("writer: pages=%llu, but there is room for %llu\n", pages, most);
        power_off(2);
    }
    whole = option_number("whole", 0) != 0;
    rate_pages_per_s = option_number("rate", 0) * PAGES_PER_MIB;
    tick_ns = option_number("tick_ms", 1000) * NS_PER_MS;
}

void board_main(unsigned cpu)
{
    if (cpu) return;
    u64 started = clock_ns();
    setup();
    for (u64 index = 0; index < pages; index++) format_page(page_at(index), index, pages, whole);
    write_pages(pages);
    print("writer ready pages=%llu prepare_ms=%llu\n", pages, (clock_ns() - started) / NS_PER_MS);
    interrupt_handle(LINE_POWER, power_button_pressed);
    interrupts_on();
    watch.last_ns = clock_ns();
    next_tick_ns = watch.last_ns + tick_ns;
    if (rate_pages_per_s) run_at_rate();
    run_at_full_speed();
}
