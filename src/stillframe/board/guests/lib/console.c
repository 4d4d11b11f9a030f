/* The serial line: a 16550, driven by polling, input also by its interrupt. */
#include "library.h"

#define UART_DATA (PORT_UART + 0)
#define UART_INTERRUPTS (PORT_UART + 1)
#define UART_FIFO (PORT_UART + 2)
#define UART_LINE (PORT_UART + 3)
#define UART_MODEM (PORT_UART + 4)
#define UART_STATUS (PORT_UART + 5)
#define STATUS_DATA_READY 0x01
#define STATUS_TRANSMITTER_EMPTY 0x20
#define FIFO_BYTES 16
#define INPUT_BYTES 256

/* Written by vCPU 0 only, with interrupts off. */
static char input[INPUT_BYTES];
static u32 input_head, input_tail, input_lines; /* free running */

void console_setup(void)
{
    out8(UART_INTERRUPTS, 0);
    out8(UART_LINE, 0x80); /* divisor latch */
    out8(UART_DATA, 1);
    out8(UART_INTERRUPTS, 0);
    out8(UART_LINE, 0x03);  /* 8n1 */
    out8(UART_FIFO, 0x01);  /* FIFOs on, what has arrived is kept */
    out8(UART_MODEM, 0x0b); /* DTR, RTS, interrupts out */
}

static void send(const char *text)
{
    u64 flags = interrupts_off();
    lock_take(CONSOLE_LOCK);
    unsigned room = 0;
    for (; *text; text++, room--) {
        while (!room)
            if (in8(UART_STATUS) & STATUS_TRANSMITTER_EMPTY) room = FIFO_BYTES;
        out8(UART_DATA, *text);
    }
    lock_release(CONSOLE_LOCK);
    interrupts_restore(flags);
}

void put_text(const char *text)
{
    send(text);
}

void put_number(u64 value)
{
    print("%llu", value);
}

static void add_signed(struct text *text, s64 value)
{
    if (value < 0) text_add(text, "-");
    text_add_number(text, value < 0 ? -(u64)value : (u64)value, 10);
}

void print(const char *format, ...)
{
    char line[400];
    struct text text = { line, 0, sizeof line };
    line[0] = 0;
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        char one[2] = { *format, 0 };
        int longs = 0;
        if (*format != '%') {
            text_add(&text, one);
            continue;
        }
        while (*++format == 'l') longs++;
        switch (*format) {
        case 's': text_add(&text, __builtin_va_arg(arguments, const char *)); break;
        case 'c':
            one[0] = __builtin_va_arg(arguments, int);
            text_add(&text, one);
            break;
        case 'd':
            add_signed(&text, longs ? __builtin_va_arg(arguments, s64)
                                    : __builtin_va_arg(arguments, int));
            break;
        case 'u':
        case 'x':
            text_add_number(&text, longs ? __builtin_va_arg(arguments, u64)
                                         : __builtin_va_arg(arguments, u32),
                            *format == 'x' ? 16 : 10);
            break;
        case 0: format--; break;
        default:
            one[0] = *format;
            text_add(&text, one);
        }
    }
    __builtin_va_end(arguments);
    send(line);
}

/* Takes what has arrived; with interrupts off. What does not fit into the buffer is lost. */
static void receive(void)
{
    while (in8(UART_STATUS) & STATUS_DATA_READY) {
        char byte = in8(UART_DATA);
        if (byte == '\r') byte = '\n';
        int ends = byte == '\n';
        u32 taken = input_head - input_tail;
        /* the last place is for the end of a line */
        if (taken >= INPUT_BYTES || (taken == INPUT_BYTES - 1 && !ends)) continue;
        input[input_head++ % INPUT_BYTES] = byte;
        input_lines += ends;
    }
}

int get_line(char *line, unsigned size)
{
    u64 flags = interrupts_off();
    receive();
    int found = input_lines != 0;
    if (found) {
        unsigned length = 0;
        char byte;
        while ((byte = input[input_tail++ % INPUT_BYTES]) != '\n')
            if (length + 1 < size) line[length++] = byte;
        if (size) line[length] = 0;
        input_lines--;
    }
    interrupts_restore(flags);
    return found;
}

static void uart_interrupt(unsigned line)
{
    (void)line;
    receive();
}

void wait_line(char *line, unsigned size)
{
    interrupt_handle(LINE_UART, uart_interrupt);
    out8(UART_INTERRUPTS, 1); /* data available */
    interrupts_on();
    for (;;) {
        u64 flags = interrupts_off();
        int found = get_line(line, size);
        if (!found) idle();
        interrupts_restore(flags);
        if (found) return;
    }
}
