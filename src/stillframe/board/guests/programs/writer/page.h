/* The page that every consistency guest writes (this one; guests/ of the checkout), and the order.
 *
 * A page is 512 words of 8 bytes, little endian:
 *   word 0, 1   magic, so that a checker finds the pages in any image of RAM
 *   word 2      page index, counted in the order of writing
 *   word 3      counter: the number of the pass that wrote it
 *   word 4      how many pages there are
 *   word 5      flags: bit 0 = every word from 6 on is written, too
 *   word 256    mix(counter, index, 256)
 *   word 511    mix(counter, index, 511)
 * A pass writes the changing words of a page in this order of addresses, and the pages in the
 * order of their index. So at any instant the words hold two neighbouring counters at most, the
 * larger one first, with one edge. guests/consistency.py knows the same layout.
 */
#ifndef SF_PAGE_H
#define SF_PAGE_H

typedef unsigned long long u64;
typedef long long s64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define PAGE_BYTES 4096ULL
#define PAGES_PER_MIB 256ULL
#define PAGE_WORDS 512
#define FIRST_FREE_WORD 6
#define MIDDLE_WORD 256
#define LAST_WORD 511

/* "StillframeGuest\n"; immediates in code, so that no page of the program looks like one of ours */
#define MAGIC_0 0x6172666c6c697453ULL
#define MAGIC_1 0x0a7473657547656dULL

#define FLAG_WHOLE 1ULL

static inline u64 mix(u64 counter, u64 index, u64 word)
{
    return (counter * 0x9e3779b97f4a7c15ULL ^ index * 0xc2b2ae3d27d4eb4fULL)
        + word * 0xd6e8feb86659fd93ULL;
}

static inline void write_page(volatile u64 *page, u64 index, u64 counter, u64 whole)
{
    page[3] = counter;
    if (!whole) {
        page[MIDDLE_WORD] = mix(counter, index, MIDDLE_WORD);
        page[LAST_WORD] = mix(counter, index, LAST_WORD);
        return;
    }
    for (u64 word = FIRST_FREE_WORD; word < PAGE_WORDS; word++)
        page[word] = mix(counter, index, word);
}

static inline void format_page(volatile u64 *page, u64 index, u64 pages, u64 whole)
{
    page[0] = MAGIC_0;
    page[1] = MAGIC_1;
    page[2] = index;
    page[4] = pages;
    page[5] = whole ? FLAG_WHOLE : 0;
}

/* The first wrong word of a page, or -1; all words must belong to `counter`. */
static inline int wrong_word(volatile u64 *page, u64 index, u64 counter, u64 pages, u64 whole)
{
    if (page[0] != MAGIC_0) return 0;
    if (page[1] != MAGIC_1) return 1;
    if (page[2] != index) return 2;
    if (page[3] != counter) return 3;
    if (page[4] != pages) return 4;
    if (page[5] != (whole ? FLAG_WHOLE : 0)) return 5;
    if (whole) {
        for (int word = FIRST_FREE_WORD; word < PAGE_WORDS; word++)
            if (page[word] != mix(counter, index, word)) return word;
        return -1;
    }
    if (page[MIDDLE_WORD] != mix(counter, index, MIDDLE_WORD)) return MIDDLE_WORD;
    if (page[LAST_WORD] != mix(counter, index, LAST_WORD)) return LAST_WORD;
    return -1;
}

#endif
