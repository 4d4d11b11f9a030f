/* The bare-metal guest: the same loop as in the Linux guest, and nothing else in the machine.
 *
 * It writes physical memory from 16 MiB on, past the hole below 4 GiB where there is one, in the
 * order of addresses. Settings come from the multiboot command line.
 */
#include "../common/guest.h"

#define FIRST_ADDRESS (16ULL << 20)
#define FOUR_GIB (4ULL << 30)
#define HAS_COMMAND_LINE 4
#define HAS_MEMORY_MAP 64
#define USABLE_RAM 1

/* ACPI's PM1a control register, where SeaBIOS puts it on pc and q35 */
#define PM_CONTROL 0x604
#define PM_SLEEP_NOW 0x2000

/* Multiboot Specification 0.6.96, section 3.3, up to the memory map */
struct multiboot_information {
    u32 flags, memory_lower, memory_upper, boot_device, command_line, modules, module_list;
    u32 symbols[4];
    u32 map_bytes, map;
};

struct __attribute__((packed)) map_entry {
    u32 size_bytes; /* of what follows */
    u64 address, length;
    u32 type;
};

static u64 low_end = FIRST_ADDRESS, high_end = FOUR_GIB;

static volatile u64 *page_at(u64 index)
{
    u64 address = FIRST_ADDRESS + index * PAGE_BYTES;
    if (address >= low_end) address += FOUR_GIB - low_end;
    return (volatile u64 *)address;
}

static void power_off(void)
{
    out16(PM_CONTROL, PM_SLEEP_NOW);
    for (;;) __asm__ volatile("cli; hlt");
}

static void rest(u64 us)
{
    (void)us;
    fail("sf.rest_us needs the Linux guest");
}

static int obey_platform(const char *command)
{
    (void)command;
    return 0;
}

static void serve_platform(void) {}

static void read_memory_map(const struct multiboot_information *information)
{
    if (!(information->flags & HAS_MEMORY_MAP)) fail("no memory map from the boot loader");
    u64 at = information->map, end = at + information->map_bytes;
    while (at < end) {
        const struct map_entry *entry = (const struct map_entry *)at;
        u64 entry_end = entry->address + entry->length;
        if (entry->type == USABLE_RAM && entry->address <= FIRST_ADDRESS && entry_end > low_end)
            low_end = entry_end & ~(PAGE_BYTES - 1);
        if (entry->type == USABLE_RAM && entry->address == FOUR_GIB)
            high_end = entry_end & ~(PAGE_BYTES - 1);
        at += entry->size_bytes + sizeof entry->size_bytes;
    }
    u64 pages = (low_end - FIRST_ADDRESS + high_end - FOUR_GIB) / PAGE_BYTES;
    if (settings.pages + settings.populated_pages > pages)
        fail("not enough memory for sf.mem and sf.populate");
}

__attribute__((used)) void start(const struct multiboot_information *information)
{
    uart_setup();
    settings_read(information->flags & HAS_COMMAND_LINE
                      ? (const char *)(u64)information->command_line
                      : "");
    read_memory_map(information);
    run();
}
