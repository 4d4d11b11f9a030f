/* Texts, numbers, and the options of the command line. */
#include "library.h"

void text_add(struct text *text, const char *more)
{
    while (*more && text->length + 1 < text->size) text->to[text->length++] = *more++;
    text->to[text->length] = 0;
}

void text_add_number(struct text *text, u64 value, unsigned base)
{
    char digits[24];
    int at = sizeof digits - 1;
    digits[at] = 0;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    text_add(text, digits + at);
}

static int is_space(char byte)
{
    return byte == ' ' || byte == '\t' || byte == '\n';
}

static const char *next_word(const char *word)
{
    while (*word && !is_space(*word)) word++;
    while (is_space(*word)) word++;
    return word;
}

static const char *first_word(void)
{
    const char *word = (const char *)board_info()->command_line;
    while (is_space(*word)) word++;
    return word;
}

/* The value, if this word is "name=value", else 0. */
static const char *value_of(const char *word, const char *name)
{
    while (*name && *word == *name) word++, name++;
    return *name == 0 && *word == '=' ? word + 1 : 0;
}

const char *option_text(const char *name)
{
    const char *found = 0;
    for (const char *word = first_word(); *word; word = next_word(word)) {
        const char *value = value_of(word, name);
        if (value) found = value;
    }
    return found;
}

u64 option_number(const char *name, u64 otherwise)
{
    const char *text = option_text(name);
    if (!text || *text < '0' || *text > '9') return otherwise;
    u64 value = 0;
    while (*text >= '0' && *text <= '9') value = value * 10 + (*text++ - '0');
    return value;
}

int option_is(const char *name, const char *value)
{
    const char *text = option_text(name);
    if (!text) return 0;
    while (*value && *text == *value) text++, value++;
    return !*value && (!*text || is_space(*text));
}

void options_known(const char *const *names)
{
    for (const char *word = first_word(); *word; word = next_word(word)) {
        const char *const *name = names;
        while (*name && !value_of(word, *name)) name++;
        if (*name) continue;
        char unknown[64];
        unsigned length = 0;
        while (word[length] && !is_space(word[length]) && length + 1 < sizeof unknown)
            unknown[length] = word[length], length++;
        unknown[length] = 0;
        print("unknown option %s; known:", unknown);
        for (name = names; *name; name++) print(" %s=", *name);
        print("\n");
        power_off(2);
    }
}
