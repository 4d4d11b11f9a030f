/* The functions that a C compiler calls without being asked to. String instructions, since a loop
 * would be turned into a call of the function that it is in. */
#include "library.h"

void *memcpy(void *to, const void *from, unsigned long bytes)
{
    void *end = to;
    __asm__ volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(bytes) : : "memory");
    return to;
}

void *memset(void *to, int value, unsigned long bytes)
{
    void *end = to;
    __asm__ volatile("rep stosb" : "+D"(end), "+c"(bytes) : "a"(value) : "memory");
    return to;
}

void *memmove(void *to, const void *from, unsigned long bytes)
{
    if ((u64)to - (u64)from >= bytes) return memcpy(to, from, bytes);
    /* backwards: the end of `from` would be overwritten otherwise */
    void *end = (u8 *)to + bytes - 1;
    from = (const u8 *)from + bytes - 1;
    __asm__ volatile("std; rep movsb; cld" : "+D"(end), "+S"(from), "+c"(bytes) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, unsigned long bytes)
{
    const u8 *left = a, *right = b;
    for (; bytes; bytes--, left++, right++)
        if (*left != *right) return *left - *right;
    return 0;
}
