/* The first C code of every vCPU, and the ways in which a guest ends. */
#include "library.h"

const struct board_info *board_information;
static volatile int console_is_ready;

extern char board_image_end[];

const struct board_info *board_info(void)
{
    return board_information;
}

/* The stacks lie at the end of RAM, that of vCPU 0 highest. */
unsigned this_cpu(void)
{
    u64 stack = (u64)__builtin_frame_address(0);
    return (board_information->ram_bytes - stack - 1) / STACK_BYTES;
}

u64 memory_start(void)
{
    return (u64)board_image_end;
}

u64 memory_end(void)
{
    return board_information->ram_bytes - board_information->vcpus * STACK_BYTES;
}

static __attribute__((noreturn)) void halt(void)
{
    for (;;) __asm__ volatile("cli; hlt");
}

void power_off(unsigned status)
{
    out32(PORT_POWER, (status & 0xff) << 16 | POWER_OFF);
    halt();
}

void system_reset(void)
{
    out32(PORT_RESET, 1);
    halt();
}

void panic(const char *text)
{
    print("panic: %s\n", text);
    out32(PORT_PANIC, 1);
    halt();
}

int power_button(void)
{
    return in32(PORT_POWER) == 1;
}

/* The vCPUs come here at the same time, and write the same values. */
__attribute__((noreturn, used)) void board_start(const struct board_info *info, u64 cpu)
{
    board_information = info;
    interrupts_setup();
    if (cpu == 0) {
        console_setup();
        console_is_ready = 1;
    }
    /* What is printed while the UART is set up would be lost. */
    while (!console_is_ready) {}
    board_main(cpu);
    if (cpu == 0) power_off(0);
    halt();
}
