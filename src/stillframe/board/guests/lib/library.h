/* What the library's files share, and guests do not see. */
#ifndef BOARD_LIBRARY_H
#define BOARD_LIBRARY_H

#include "board.h"
#include "ports.h"

#define STACK_BYTES 65536
#define CONSOLE_LOCK LOCK_UNITS

extern const struct board_info *board_information;

void console_setup(void);
void interrupts_setup(void);

/* Text that grows in a buffer; what does not fit is left out. */
struct text {
    char *to;
    unsigned length, size;
};

void text_add(struct text *text, const char *more);
void text_add_number(struct text *text, u64 value, unsigned base);

#endif
