/* The first serial line, driven by polling a few bytes at a time, so that talking never holds up
 * the loop that measures. (A kernel's driver would take interrupts in bursts of 16 bytes.)
 */
#ifndef SF_UART_H
#define SF_UART_H

#include "page.h"
#include "ports.h"

#define COM1 0x3f8
#define LSR_DATA_READY 0x01
#define LSR_TRANSMITTER_EMPTY 0x20
#define BYTES_PER_TURN 4 /* each costs QEMU a system call */
#define OUTPUT_BYTES 8192

struct uart {
    char output[OUTPUT_BYTES];
    u32 head, tail; /* free running */
    char input[64];
    u32 input_length;
};

static inline void uart_setup(void)
{
    out8(COM1 + 1, 0);    /* no interrupts */
    out8(COM1 + 3, 0x80); /* divisor latch */
    out8(COM1 + 0, 1);
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 0x03); /* 8n1 */
    out8(COM1 + 2, 0x01); /* FIFOs on, what has arrived is kept */
    out8(COM1 + 4, 0x03);
}

/* A line that does not fit is dropped as a whole. */
static inline void uart_print(struct uart *uart, const char *text)
{
    u32 length = 0;
    while (text[length]) length++;
    if (uart->head - uart->tail + length > OUTPUT_BYTES) return;
    for (u32 i = 0; i < length; i++)
        uart->output[uart->head++ % OUTPUT_BYTES] = text[i];
}

/* Moves a few bytes each way. Returns 1 when `input` holds a whole command, without its end. */
static inline int uart_turn(struct uart *uart)
{
    u8 status = in8(COM1 + 5);
    if (status & LSR_TRANSMITTER_EMPTY)
        for (int i = 0; i < BYTES_PER_TURN && uart->tail != uart->head; i++)
            out8(COM1, uart->output[uart->tail++ % OUTPUT_BYTES]);
    while (status & LSR_DATA_READY) {
        char byte = in8(COM1);
        if (byte == '\n' || byte == '\r') {
            int complete = uart->input_length > 0;
            uart->input[uart->input_length] = 0;
            uart->input_length = 0;
            if (complete) return 1;
        } else if (uart->input_length < sizeof uart->input - 1) {
            uart->input[uart->input_length++] = byte;
        }
        status = in8(COM1 + 5);
    }
    return 0;
}

static inline void uart_flush(struct uart *uart)
{
    for (u64 turns = 0; uart->tail != uart->head && turns < 1000000; turns++)
        uart_turn(uart);
}

#endif
