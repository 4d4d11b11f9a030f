/* Text without a C library. */
#ifndef SF_TEXT_H
#define SF_TEXT_H

#include "page.h"

struct line {
    char text[320];
    u32 length;
};

static inline void line_add(struct line *line, const char *text)
{
    while (*text && line->length < sizeof line->text - 1)
        line->text[line->length++] = *text++;
    line->text[line->length] = 0;
}

static inline void line_add_number(struct line *line, const char *name, u64 value)
{
    char digits[24];
    int at = sizeof digits - 1;
    digits[at] = 0;
    do {
        digits[--at] = '0' + value % 10;
        value /= 10;
    } while (value);
    line_add(line, name);
    line_add(line, digits + at);
}

static inline int text_equal(const char *a, const char *b)
{
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

/* The text after "name=" in a command line of words, or 0. The last one counts. */
static inline const char *option_text(const char *arguments, const char *name)
{
    const char *found = 0;
    for (const char *word = arguments; *word;) {
        const char *a = word, *b = name;
        while (*b && *a == *b) a++, b++;
        if (!*b && *a == '=') found = a + 1;
        while (*word && *word != ' ' && *word != '\n') word++;
        while (*word == ' ' || *word == '\n') word++;
    }
    return found;
}

static inline s64 option_number(const char *arguments, const char *name, s64 otherwise)
{
    const char *text = option_text(arguments, name);
    if (!text) return otherwise;
    s64 sign = 1, value = 0;
    if (*text == '-') sign = -1, text++;
    while (*text >= '0' && *text <= '9') value = value * 10 + (*text++ - '0');
    return sign * value;
}

static inline int option_is(const char *arguments, const char *name, const char *value)
{
    const char *text = option_text(arguments, name);
    if (!text) return 0;
    while (*value && *text == *value) text++, value++;
    return !*value && (*text == 0 || *text == ' ' || *text == '\n');
}

#endif
