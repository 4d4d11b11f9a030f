/* The init of the Linux guest: the only program in its initramfs, without a C library.
 *
 * It takes its settings from the kernel's command line (guests/README.md) and drives the serial
 * line itself (iopl); the kernel's console shares it, and is quiet unless something is wrong.
 */
#include "../common/guest.h"

enum {
    SYS_read = 0, SYS_open = 2, SYS_close = 3, SYS_mmap = 9, SYS_nanosleep = 35, SYS_iopl = 172, SYS_reboot = 169,
    SYS_mount = 165, SYS_sysinfo = 99,
};
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, MAP_POPULATE = 0x8000 };

#define LEFT_TO_THE_KERNEL_BYTES (8ULL << 20)

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static long syscall3(long number, long a, long b, long c)
{
    return syscall6(number, a, b, c, 0, 0, 0);
}

static volatile u64 *memory;
static char command_line[4096];

static volatile u64 *page_at(u64 index) { return memory + index * PAGE_WORDS; }

static void power_off(void)
{
    syscall6(SYS_reboot, 0xfee1dead, 672274793, 0x4321fedc, 0, 0, 0);
    for (;;) {}
}

static void rest(u64 us)
{
    s64 time[2] = { us / 1000000, us % 1000000 * 1000 };
    syscall3(SYS_nanosleep, (long)time, 0, 0);
}

static void read_command_line(void)
{
    syscall6(SYS_mount, (long)"proc", (long)"/proc", (long)"proc", 0, 0, 0);
    long fd = syscall3(SYS_open, (long)"/proc/cmdline", 0, 0);
    if (fd < 0) fail("cannot read /proc/cmdline");
    long length = syscall3(SYS_read, fd, (long)command_line, sizeof command_line - 1);
    if (length < 0) fail("cannot read /proc/cmdline");
    syscall3(SYS_close, fd, 0, 0);
}

/* Linux's struct sysinfo: uptime, loads[3], totalram, freeram, ... */
static u64 free_memory_bytes(void)
{
    u64 information[16] = { 0 };
    syscall3(SYS_sysinfo, (long)information, 0, 0);
    return information[5];
}

static void map_memory(void)
{
    u64 bytes = (settings.pages + settings.populated_pages) * PAGE_BYTES;
    if (!bytes) return;
    if (free_memory_bytes() < bytes + LEFT_TO_THE_KERNEL_BYTES)
        fail("not enough memory for sf.mem and sf.populate");
    long address = syscall6(SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (address < 0) fail("cannot map memory for sf.mem and sf.populate");
    memory = (volatile u64 *)address;
}

#include "journal.h"
#include "agent.h"

__attribute__((used)) void start(void)
{
    /* with the console closed, the kernel's driver takes no interrupts of the line */
    for (int fd = 0; fd < 3; fd++) syscall3(SYS_close, fd, 0, 0);
    if (syscall3(SYS_iopl, 3, 0, 0) < 0) power_off();
    uart_setup();
    read_command_line();
    settings_read(command_line);
    agent_start(option_number(command_line, "sf.agent", 0) != 0);
    map_memory();
    journal_start(option_number(command_line, "sf.journal", 0));
    load_start(option_number(command_line, "sf.load", 0), option_number(command_line, "sf.load_disks", 1));
    run();
}

__asm__(".globl _start\n_start:\n xor %ebp, %ebp\n and $-16, %rsp\n call start\n");
