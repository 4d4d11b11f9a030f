/* Memory that is filled once and then left alone ("populated"), and checked by the audit.
 * Each page's content follows from its number alone.
 */
#ifndef SF_FILL_H
#define SF_FILL_H

#include "page.h"

enum fill_kind { FILL_RANDOM, FILL_TEXT, FILL_ZERO };

static const char fill_words[32][8] = {
    "instant ", "machine ", "picture ", "the run ", "snapshot", " writes ", " memory ", "running ",
    "a page, ", "pages of", " quickly", "still.  ", "frames, ", "guest's ", "it goes ", "forward ",
    "nothing ", "changes ", "between ", "seconds ", "copies, ", "kernel. ", "because ", "storage ",
    "virtual ", "counter ", "longest ", "waiting ", "regular ", "without ", "another ", "through ",
};

static inline u64 next_random(u64 *state)
{
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *state = x;
    return x * 0x2545f4914f6cdd1dULL;
}

static inline u64 fill_word(u64 *state, enum fill_kind kind)
{
    if (kind == FILL_ZERO) return 0;
    u64 value = next_random(state);
    if (kind == FILL_RANDOM) return value;
    u64 text = 0;
    for (int i = 0; i < 8; i++)
        text |= (u64)(u8)fill_words[value >> 59][i] << (8 * i);
    return text;
}

static inline void fill_page(volatile u64 *page, u64 index, enum fill_kind kind)
{
    u64 state = (index + 1) * 0x9e3779b97f4a7c15ULL;
    for (int word = 0; word < PAGE_WORDS; word++)
        page[word] = fill_word(&state, kind);
}

static inline int wrong_fill_word(volatile u64 *page, u64 index, enum fill_kind kind)
{
    u64 state = (index + 1) * 0x9e3779b97f4a7c15ULL;
    for (int word = 0; word < PAGE_WORDS; word++)
        if (page[word] != fill_word(&state, kind)) return word;
    return -1;
}

#endif
