/* The interrupt descriptor table, the handlers of the lines, and what exceptions do. */
#include "library.h"

#define VECTORS 48
#define FIRST_LINE_VECTOR 0x20
#define LINES 16
#define CODE_SELECTOR 0x08
#define INTERRUPT_GATE 0x8e00 /* present, privilege 0, interrupts off (Intel SDM 3A, 6.14.1) */
#define ENTRY_BYTES 16
#define FLAG_INTERRUPTS 0x200

struct interrupt_frame {
    u64 rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15;
    u64 vector, error_code;
    u64 rip, cs, rflags, rsp, ss;
};

struct gate {
    u64 low, high;
};

struct __attribute__((packed)) table_pointer {
    u16 limit;
    u64 base;
};

extern const u8 board_vectors[VECTORS][ENTRY_BYTES];
extern const u8 idle_halt[], idle_end[];

static struct gate table[VECTORS];
static interrupt_handler *volatile handlers[LINES];

/* Every vCPU fills in the same table, so that none has to wait for another. */
void interrupts_setup(void)
{
    for (unsigned vector = 0; vector < VECTORS; vector++) {
        u64 entry = (u64)board_vectors[vector];
        table[vector].low = (entry & 0xffff) | (u64)CODE_SELECTOR << 16
            | (u64)INTERRUPT_GATE << 32 | (entry >> 16 & 0xffff) << 48;
        table[vector].high = entry >> 32;
    }
    struct table_pointer pointer = { sizeof table - 1, (u64)table };
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

static __attribute__((noreturn)) void exception(const struct interrupt_frame *frame)
{
    print("exception %llu on vCPU %u: error code 0x%llx, rip 0x%llx, rsp 0x%llx\n", frame->vector,
          this_cpu(), frame->error_code, frame->rip, frame->rsp);
    panic("exception");
}

__attribute__((used)) void board_interrupt(struct interrupt_frame *frame)
{
    if (frame->vector < FIRST_LINE_VECTOR) exception(frame);
    unsigned line = frame->vector - FIRST_LINE_VECTOR;
    interrupt_handler *handler = handlers[line];
    if (handler) handler(line);
    if (frame->rip == (u64)idle_halt) frame->rip = (u64)idle_end;
}

void interrupt_handle(unsigned line, interrupt_handler *handler)
{
    handlers[line] = handler;
    out32(PORT_LINES_ENABLED, in32(PORT_LINES_ENABLED) | 1U << line);
}

u64 interrupts_off(void)
{
    u64 flags;
    __asm__ volatile("pushfq; popq %0; cli" : "=r"(flags) : : "memory");
    return flags;
}

void interrupts_restore(u64 flags)
{
    if (flags & FLAG_INTERRUPTS) interrupts_on();
}

void interrupts_on(void)
{
    __asm__ volatile("sti" : : : "memory");
}

void wake(unsigned cpu)
{
    out32(PORT_WAKE, cpu);
}
