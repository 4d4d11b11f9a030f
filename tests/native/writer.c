/* A process that stands in for a VMM in tests of the capture core: one mapping, written in
 * a known order. Pass n writes n into the first and the last word of each page, in address
 * order, so that at any instant the words hold two neighbouring values at most, the larger
 * first. The last quarter is never populated.
 *
 * Usage: writer KIND MIB PAGES_PER_S
 *   KIND         private, thp (private, in transparent huge pages), shared (memfd), zero (shared without a name), hugetlb (shared),
 *                hugetlb-private
 *   PAGES_PER_S  0: as fast as it can; -1: never
 * Prints "ADDRESS LENGTH FD PAGE_SIZE" (FD -1 if it has none), then "PASSES LONGEST_GAP_US
 * PAGES_WRITTEN RESULT" for each command that it reads; ends with its standard input.
 *   s                status                     r            status, and restart the gap
 *   p                pause the writing thread   c            continue it
 *   w OFFSET VALUE   write one word             z            exit at once
 *   d OFFSET LENGTH  madvise(MADV_DONTNEED)     m .. ..      madvise(MADV_REMOVE)
 *   h OFFSET LENGTH  punch a hole in the file   u .. ..      munmap
 *   i OFFSET LENGTH  number of resident pages (mincore) */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t passes, longest_ns, written_pages;
static volatile int pause_wanted, paused;
static char *ram;
static int fd = -1;

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static long resident(char *start, size_t length) {
    size_t pages = length / 4096;
    unsigned char *vector = malloc(pages);
    long count = 0;
    if (mincore(start, length, vector)) count = -1;
    else for (size_t i = 0; i < pages; i++) count += vector[i] & 1;
    free(vector);
    return count;
}

static long command(char kind, size_t offset, uint64_t value) {
    char *start = ram + offset;
    switch (kind) {
    case 'r': longest_ns = 0; return 0;
    case 'p':
        pause_wanted = 1;
        while (!paused) usleep(20);
        return 0;
    case 'c':
        pause_wanted = 0;
        while (paused) usleep(20);
        return 0;
    case 'w': *(volatile uint64_t *)start = value; return 0;
    case 'd': return madvise(start, value, MADV_DONTNEED) ? errno : 0;
    case 'm': return madvise(start, value, MADV_REMOVE) ? errno : 0;
    case 'h':
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)value) ? errno : 0;
    case 'u': return munmap(start, value) ? errno : 0;
    case 'i': return resident(start, value);
    case 'z': _exit(0);
    }
    return 0;
}

static void *commands(void *unused) {
    char line[80];
    while (fgets(line, sizeof line, stdin)) {
        char kind = 's';
        size_t offset = 0;
        uint64_t value = 0;
        sscanf(line, "%c %zu %lu", &kind, &offset, &value);
        long result = command(kind, offset, value);
        printf("%lu %lu %lu %ld\n", passes, longest_ns / 1000, written_pages, result);
        fflush(stdout);
    }
    _exit(0);
    return unused;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const char *kind = argv[1];
    size_t length = (size_t)atol(argv[2]) << 20;
    long pages_per_s = atol(argv[3]);
    int huge = !strncmp(kind, "hugetlb", 7);
    int thp = !strcmp(kind, "thp");
    int flags = thp || !strncmp(kind, "private", 7) || !strncmp(kind, "hugetlb-private", 15) ? MAP_PRIVATE : MAP_SHARED;
    size_t page = huge ? 2 << 20 : 4096;
    if (!strcmp(kind, "shared") || !strcmp(kind, "hugetlb") || !strcmp(kind, "hugetlb-private-memfd")) {
        fd = memfd_create("writer", huge ? MFD_HUGETLB : 0);
        if (fd < 0 || ftruncate(fd, (off_t)length)) return 3;
    } else {
        flags |= MAP_ANONYMOUS | (huge ? MAP_HUGETLB | MAP_NORESERVE : 0);
    }
    ram = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (ram == MAP_FAILED) return 4;
    madvise(ram, length, thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    size_t written = length - length / 4;
    written -= written % page;
    for (size_t at = 0; at < written; at += page) *(volatile uint64_t *)(ram + at) = 0;
    if (thp) madvise(ram, written, 25); /* MADV_COLLAPSE: where there was no huge page free just then */
    printf("%lu %zu %d %zu\n", (unsigned long)ram, length, fd, page);
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, commands, NULL);
    uint64_t last = now_ns(), began = last;
    for (uint64_t pass = 1;; pass++) {
        for (size_t at = 0; at < written; at += page) {
            while (pause_wanted || pages_per_s < 0) {
                paused = pause_wanted;
                usleep(50);
                last = now_ns();
            }
            paused = 0;
            *(volatile uint64_t *)(ram + at) = pass;
            *(volatile uint64_t *)(ram + at + page - 8) = pass;
            written_pages++;
            uint64_t now = now_ns();
            if (now - last > longest_ns) longest_ns = now - last;
            last = now;
            while (pages_per_s > 0 && !pause_wanted &&
                   now_ns() - began < written_pages * 1000000000ull / (uint64_t)pages_per_s) {
                usleep(100);
                last = now_ns();
            }
        }
        passes = pass;
    }
}
