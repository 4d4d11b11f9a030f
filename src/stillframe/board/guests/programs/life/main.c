/* Game of Life in the framebuffer, by all vCPUs, each with rows of its own.
 *
 * Options: cell=PIXELS (edge of a cell, 4), seed=NUMBER (1), density=PERCENT alive at first (30),
 * rate=GENERATIONS_PER_S (0: full speed), generations=NUMBER (hold there; 0: never),
 * tick_ms=PERIOD.
 * Input, a line each: h (hold), g (go on), a (audit: is every pixel as its cell?), q (power off;
 * status 1 if an audit failed).
 *
 * The world is a torus. Generation 0 follows from the seed: cell after cell, by rows, alive if
 * next_random() >> 32 modulo 100 is below the density. Only cells that change are drawn.
 */
#include "board.h"

#define ALIVE 0x00ffd166
#define DEAD 0x00112233
#define MOST_CELLS (1024 * 1024)

static u8 worlds[2][MOST_CELLS];
static u64 width, height, cell, stride; /* cells, cells, pixels, pixels */

static struct barrier barrier;
static u64 generations_wanted, period_ns;

/* By vCPU 0: how many generations may be made. Everybody makes one when this says so. While
 * vCPU 0 `rests`, it wakes the others afterwards, so they may idle; else they spin. */
static volatile u64 allowed;
static volatile int rests;
static int holding; /* nothing more is allowed */

static struct stopwatch watch;
static u64 ticks, tick_ns, next_tick_ns;
static int audits_failed;

static u64 next_random(u64 *state)
{
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static void draw(u64 x, u64 y, u8 alive)
{
    volatile u32 *pixel = framebuffer() + y * cell * stride + x * cell;
    u32 color = alive ? ALIVE : DEAD;
    for (u64 row = 0; row < cell; row++, pixel += stride)
        for (u64 column = 0; column < cell; column++) pixel[column] = color;
}

/* Makes the rows from `first` to before `end` of `to`, which follows `from`. */
static void make_rows(const u8 *from, u8 *to, u64 first, u64 end)
{
    for (u64 y = first; y < end; y++) {
        const u8 *row = from + y * width;
        const u8 *above = from + (y ? y - 1 : height - 1) * width;
        const u8 *below = from + (y + 1 < height ? y + 1 : 0) * width;
        /* three cells above each other, left of x and at x */
        unsigned left = above[width - 1] + row[width - 1] + below[width - 1];
        unsigned here = above[0] + row[0] + below[0];
        for (u64 x = 0; x < width; x++) {
            u64 next = x + 1 < width ? x + 1 : 0;
            unsigned right = above[next] + row[next] + below[next];
            unsigned nine = left + here + right;
            u8 alive = nine == 3 || (nine == 4 && row[x]);
            to[y * width + x] = alive;
            if (alive != row[x]) draw(x, y, alive);
            left = here;
            here = right;
        }
    }
}

static void audit(u64 generation)
{
    const u8 *world = worlds[generation & 1];
    u64 alive = 0, bad = 0, bad_x = 0, bad_y = 0;
    for (u64 y = 0; y < height * cell; y++) {
        for (u64 x = 0; x < width * cell; x++) {
            u8 expected = world[y / cell * width + x / cell];
            if (framebuffer()[y * stride + x] == (expected ? ALIVE : DEAD)) continue;
            if (!bad++) bad_x = x, bad_y = y;
        }
    }
    for (u64 index = 0; index < width * height; index++) alive += world[index];
    if (bad) {
        audits_failed = 1;
        print("AUDIT FAILED generation=%llu: %llu pixels are not as their cells, the first at "
              "%llu,%llu\n", generation, bad, bad_x, bad_y);
    } else {
        print("AUDIT ok generation=%llu alive=%llu\n", generation, alive);
    }
    watch.last_ns = clock_ns(); /* an audit is no gap */
}

static void obey(const char *line, u64 generation)
{
    char command = line[0] && !line[1] ? line[0] : 0;
    if (command == 'a') {
        audit(generation);
    } else if (command == 'h') {
        holding = 1;
        print("life holds generation=%llu\n", generation);
    } else if (command == 'g') {
        holding = 0;
        generations_wanted = 0;
    } else if (command == 'q') {
        print("life off generation=%llu\n", generation);
        power_off(audits_failed);
    } else {
        put_text("unknown command; known: h (hold), g (go on), a (audit), q (power off)\n");
    }
}

/* Between generations, when nobody draws: vCPU 0's other duties, until the next may be made. */
static void serve(u64 generation)
{
    static u64 next_generation_ns;
    char line[64];
    if (generations_wanted && generation == generations_wanted) {
        holding = 1;
        print("life holds generation=%llu\n", generation);
    }
    stopwatch_read(&watch, 0);
    for (;;) {
        if (watch.last_ns >= next_tick_ns) {
            print("tick %llu generation=%llu gap_us=%llu\n", ++ticks, generation,
                  watch.longest_ns / 1000);
            watch.longest_ns = 0;
            next_tick_ns = watch.last_ns + tick_ns;
        }
        if (get_line(line, sizeof line)) obey(line, generation);
        if (!holding && watch.last_ns >= next_generation_ns) break;
        u64 wait = holding ? 10 * NS_PER_MS : next_generation_ns - watch.last_ns;
        rests = 1;
        u64 flags = interrupts_off();
        timer_once(wait, 0);
        idle();
        interrupts_restore(flags);
        stopwatch_read(&watch, wait);
    }
    next_generation_ns += period_ns;
    if (next_generation_ns < watch.last_ns) next_generation_ns = watch.last_ns;
    allowed = generation + 1;
    if (!rests) return;
    rests = 0;
    for (unsigned cpu = 1; cpu < board_info()->vcpus; cpu++) wake(cpu);
}

static void wait_until_allowed(u64 generation)
{
    while (allowed <= generation) {
        u64 flags = interrupts_off();
        if (allowed <= generation && rests) idle();
        interrupts_restore(flags);
    }
}

static void prepare(void)
{
    u64 seed = option_number("seed", 1);
    u64 density = option_number("density", 30);
    u64 state = (seed + 1) * 0x9e3779b97f4a7c15ULL;
    for (u64 y = 0; y < height; y++) {
        for (u64 x = 0; x < width; x++) {
            u8 alive = (next_random(&state) >> 32) % 100 < density;
            worlds[0][y * width + x] = alive;
            draw(x, y, alive);
        }
    }
}

static void setup(void)
{
    static const char *const names[] = {
        "cell", "seed", "density", "rate", "generations", "tick_ms", 0,
    };
    options_known(names);
    cell = option_number("cell", 4);
    stride = board_info()->width;
    width = cell ? board_info()->width / cell : 0;
    height = cell ? board_info()->height / cell : 0;
    if (width < 3 || height < 3 || width * height > MOST_CELLS) {
        print("life: cell=%llu makes %llu x %llu cells; at least 3 x 3, at most %u in all\n", cell,
              width, height, MOST_CELLS);
        power_off(2);
    }
    u64 rate = option_number("rate", 0);
    period_ns = rate ? NS_PER_S / rate : 0;
    generations_wanted = option_number("generations", 0);
    tick_ns = option_number("tick_ms", 1000) * NS_PER_MS;
    prepare();
    print("life ready width=%llu height=%llu cell=%llu vcpus=%llu\n", width, height, cell,
          board_info()->vcpus);
    watch.last_ns = clock_ns();
    next_tick_ns = watch.last_ns + tick_ns;
}

static void power_button_pressed(unsigned line)
{
    if (power_button()) power_off(audits_failed);
}

void board_main(unsigned cpu)
{
    if (cpu == 0) setup();
    barrier_wait(&barrier);
    u64 vcpus = board_info()->vcpus;
    u64 first = height * cpu / vcpus, end = height * (cpu + 1) / vcpus;
    if (cpu == 0) {
        interrupt_handle(LINE_TIMER, 0);
        interrupt_handle(LINE_POWER, power_button_pressed);
    } else {
        interrupt_handle(LINE_WAKE, 0);
    }
    interrupts_on();
    for (u64 generation = 0;; generation++) {
        if (cpu == 0) {
            serve(generation);
        } else {
            wait_until_allowed(generation);
        }
        make_rows(worlds[generation & 1], worlds[(generation + 1) & 1], first, end);
        barrier_wait(&barrier);
    }
}
