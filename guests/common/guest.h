/* The guest's main loop, the same under Linux and on the bare machine.
 *
 * A platform gives: page_at(index) for the pages of the working set and, after them, the populated
 * ones; power_off(); rest(us), which lets the processor idle; obey_platform(command), which is 1 for
 * a command of its own; serve_platform(), which is called as often as the serial line.
 */
#ifndef SF_GUEST_H
#define SF_GUEST_H

#include "calibrate.h"
#include "clock.h"
#include "fill.h"
#include "page.h"
#include "text.h"
#include "uart.h"

#define SERVICE_US 500         /* how often the serial line gets its turn */
#define TICK_BACKLOG_BYTES 1024
#define LONGEST_CATCH_UP_US 50000

static volatile u64 *page_at(u64 index);
static void power_off(void);
static void rest(u64 us);
static int obey_platform(const char *command);
static void serve_platform(void);

struct settings {
    s64 rate_mib_per_s;
    u64 pages, populated_pages, whole, tick_ms, pages_per_reading, rest_us;
    enum fill_kind fill;
};

static struct settings settings;
static struct clock clock;
static struct uart uart;

/* The next page to write is `position`, in the pass `pass`. */
static u64 position, pass, pages_written, tick_number, reset_at_edge;

static void settings_read(const char *arguments)
{
    settings.rate_mib_per_s = option_number(arguments, "sf.rate", 0);
    settings.pages = option_number(arguments, "sf.mem", 32) * PAGES_PER_MIB;
    settings.populated_pages = option_number(arguments, "sf.populate", 0) * PAGES_PER_MIB;
    settings.whole = option_number(arguments, "sf.whole", 0) != 0;
    settings.tick_ms = option_number(arguments, "sf.tick_ms", 100);
    settings.pages_per_reading = option_number(arguments, "sf.clock_pages", 1);
    settings.rest_us = option_number(arguments, "sf.rest_us", 0);
    settings.fill = option_is(arguments, "sf.fill", "text") ? FILL_TEXT
        : option_is(arguments, "sf.fill", "zero")           ? FILL_ZERO
                                                            : FILL_RANDOM;
}

static void print_now(const char *text)
{
    uart_print(&uart, text);
    uart_flush(&uart);
}

static void fail(const char *text)
{
    print_now("fatal: ");
    print_now(text);
    print_now("\n");
    power_off();
}

static void print_tick(void)
{
    struct line line = { .length = 0 };
    line_add_number(&line, "tick n=", tick_number++);
    line_add_number(&line, " t_ms=", clock_us(&clock) / 1000);
    line_add_number(&line, " passes=", pass - 1);
    line_add_number(&line, " pages=", pages_written);
    line_add_number(&line, " gap_us=", clock.tick_gap_ticks / clock.ticks_per_us);
    line_add_number(&line, " gap_max_us=", clock.max_gap_ticks / clock.ticks_per_us);
    line_add_number(&line, " stop_us=", clock.tick_stop_us);
    line_add_number(&line, " stop_max_us=", clock.max_stop_us);
    line_add_number(&line, " stall_max_us=", clock.max_stall_us);
    line_add_number(&line, " over_1ms=", clock.over_1ms);
    line_add_number(&line, " seconds=", clock.edges);
    line_add(&line, "\n");
    uart_print(&uart, line.text);
    clock.tick_gap_ticks = clock.tick_stop_us = 0;
}

/* Every page is compared with what this loop knows that it wrote. */
static void audit(void)
{
    u64 bad = 0, bad_page = 0, bad_word = 0, found = 0;
    for (u64 index = 0; index < settings.pages; index++) {
        clock_now(&clock);
        u64 counter = index < position ? pass : pass - 1;
        int word = wrong_word(page_at(index), index, counter, settings.pages, settings.whole);
        if (word < 0) continue;
        if (!bad++) bad_page = index, bad_word = word, found = page_at(index)[word];
    }
    for (u64 index = 0; index < settings.populated_pages; index++) {
        clock_now(&clock);
        volatile u64 *page = page_at(settings.pages + index);
        int word = wrong_fill_word(page, index, settings.fill);
        if (word < 0) continue;
        if (!bad++) bad_page = settings.pages + index, bad_word = word, found = page[word];
    }
    struct line line = { .length = 0 };
    line_add(&line, bad ? "audit FAILED" : "audit ok");
    line_add_number(&line, " pages=", settings.pages);
    line_add_number(&line, " populated=", settings.populated_pages);
    line_add_number(&line, " pass=", pass);
    line_add_number(&line, " edge=", position);
    if (bad) {
        line_add_number(&line, " bad=", bad);
        line_add_number(&line, " first_page=", bad_page);
        line_add_number(&line, " word=", bad_word);
        line_add_number(&line, " found=", found);
    }
    line_add(&line, "\n");
    uart_print(&uart, line.text);
}

static void obey(const char *command)
{
    if (text_equal(command, "audit")) {
        audit();
    } else if (text_equal(command, "reset")) {
        /* at the next change of seconds, so that no stop from before is found after it */
        reset_at_edge = clock.edges + 1;
    } else if (text_equal(command, "quit")) {
        print_now("quit ok\n");
        power_off();
    } else if (!obey_platform(command)) {
        uart_print(&uart, "unknown command; known: audit, reset, quit, write (with an agent)\n");
    }
}

static void prepare_memory(void)
{
    for (u64 index = 0; index < settings.pages; index++) {
        format_page(page_at(index), index, settings.pages, settings.whole);
        write_page(page_at(index), index, 1, settings.whole);
    }
    for (u64 index = 0; index < settings.populated_pages; index++)
        fill_page(page_at(settings.pages + index), index, settings.fill);
}

static void print_ready(u64 prepare_ms)
{
    struct line line = { .length = 0 };
    line_add_number(&line, "ready pages=", settings.pages);
    line_add_number(&line, " populated=", settings.populated_pages);
    line_add_number(&line, " ticks_per_us=", clock.ticks_per_us);
    line_add_number(&line, " prepare_ms=", prepare_ms);
    line_add(&line, "\n");
    print_now(line.text);
}

static void write_next_page(void)
{
    write_page(page_at(position), position, pass, settings.whole);
    pages_written++;
    if (++position == settings.pages) position = 0, pass++;
}

/* The time that it meant to rest is no gap; what it overslept is. */
static void rest_now(void)
{
    u64 meant = settings.rest_us * clock.ticks_per_us;
    rest(settings.rest_us);
    u64 rested = read_ticks() - clock.last_ticks;
    clock.last_ticks += rested < meant ? rested : meant;
}

static void run(void)
{
    clock_start(&clock, calibrate());
    prepare_memory();
    print_ready((read_ticks() - clock.start_ticks) / clock.ticks_per_us / 1000);

    u64 service_ticks = SERVICE_US * clock.ticks_per_us;
    u64 tick_ticks = settings.tick_ms * 1000 * clock.ticks_per_us;
    /* ticks per page, so that the loop needs no division */
    u64 page_ticks = settings.rate_mib_per_s > 0
        ? clock.ticks_per_second / (settings.rate_mib_per_s * PAGES_PER_MIB)
        : 0;
    pass = 2;
    clock_start(&clock, clock.ticks_per_second);
    u64 next_service = clock.last_ticks + service_ticks;
    u64 next_tick = clock.last_ticks + tick_ticks;
    u64 next_page = clock.last_ticks;
    for (;;) {
        u64 now = clock_now(&clock);
        if (settings.rate_mib_per_s >= 0 && settings.pages && (s64)(now - next_page) >= 0) {
            for (u64 page = 0; page < settings.pages_per_reading; page++) write_next_page();
            next_page += page_ticks * settings.pages_per_reading;
        } else if (settings.rest_us) {
            rest_now();
        }
        if (now < next_service) continue;
        if (uart_turn(&uart)) obey(uart.input);
        serve_platform();
        if (reset_at_edge && clock.edges >= reset_at_edge) {
            reset_at_edge = 0;
            clock_reset(&clock);
            uart_print(&uart, "reset ok\n");
        }
        now = clock_now(&clock);
        next_service = now + service_ticks;
        /* a guest that rests talks slowly: ticks must not leave answers without room */
        if (now >= next_tick && uart.head - uart.tail < TICK_BACKLOG_BYTES) {
            print_tick();
            next_tick += tick_ticks;
            if (next_tick < now) next_tick = now + tick_ticks;
        }
        /* after a long stall, do not catch up at full speed for ever */
        if ((s64)(now - next_page) > (s64)(LONGEST_CATCH_UP_US * clock.ticks_per_us))
            next_page = now;
    }
}

#endif
